"""A finished gate run, the input of every report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantgate.judging.results import CheckResult, overall, probes_of
from quantgate.measuring.engine import EngineLife
from quantgate.reporting.shard import Shard
from quantgate.subject.tier import TIERS, RunTier, Tier

# What the next tier would add.
ADDED: Mapping[Tier, str] = {
    "quick": "--tier standard adds float32, distributions, drift, invariance, noise floors and all "
    "of the probe",
    "standard": "--tier full adds two ranks, a compiled engine, invariance of the whole probe, "
    "noise floors measured anew and long contexts",
    "full": "",
}


def probes_line(results: Sequence[CheckResult]) -> str:
    """Return in one line what was scored; "" if nothing was."""
    said = (f"{p.name} ({p.tokens:,} tokens, sha256 {p.sha256[:12]})" for p in probes_of(results))
    line = ", ".join(said)
    return line and f"scored: {line}"


def tiers_line(tiers: Mapping[str, RunTier]) -> str:
    """Return in one line what was asked, what a higher tier adds, and what it does not release."""
    asked = sorted({tier.asked for tier in tiers.values()}, key=TIERS.index)
    said = f"tier: {' and '.join(asked)}"
    if asked and (adds := ADDED[asked[0]]):
        said += f"; {adds}"
    short = [name for name, tier in tiers.items() if not tier.suffices]
    if short:
        others = f" and {len(short) - 1} more" if len(short) > 1 else ""
        said += (
            f"; the file of {short[0]}{others} asks for tier {tiers[short[0]].required}, so this "
            "run does not release it"
        )
    return said


@dataclass(frozen=True)
class Run:
    """The results of a run, and the context that a reader needs."""

    results: Sequence[CheckResult]
    started: str
    """ISO 8601, UTC."""
    duration_s: float
    environment: Mapping[str, str]
    left_out: Sequence[tuple[str, str]] = ()
    """The checks that this machine or a checkpoint cannot run, each with the reason."""
    notes: Sequence[str] = ()
    engines: Sequence[EngineLife] = ()
    """The engines that this run started."""
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By checkpoint: the history of its golden in the serving dtype, oldest first."""
    place_of: Callable[[str], int] = lambda _: 0
    """The position of a check in the order of display; see `checks.place_of`."""
    tiers: Mapping[str, RunTier] = field(default_factory=dict)
    """By checkpoint."""
    shard: Shard | None = None
    """Which part of a selection this run judged; None for a whole run and a merged one."""

    @property
    def released(self) -> bool:
        """Whether every check passed, and as much was asked of each checkpoint as must be."""
        suffices = all(tier.suffices for tier in self.tiers.values())
        return overall(list(self.results)) == "pass" and suffices

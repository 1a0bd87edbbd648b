"""The results of a gate run, the input of every report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from quantgate.judging.stats import ALPHA, holm
from quantgate.judging.verdict import Outcome, Verdict, worst
from quantgate.subject.probe import ScoredProbe
from quantgate.subject.task import GENERATE, Task


@dataclass(frozen=True)
class CheckResult:
    """One check of one checkpoint."""

    checkpoint: str
    scheme: str
    check: str
    verdict: Verdict
    seconds: float = 0.0
    """How long its test took; the first check to need a measurement pays for it."""
    task: Task = GENERATE
    base: str | None = None
    """The unquantized model that it was compared with, as its file or `--base` names it."""
    probes: tuple[ScoredProbe, ...] = ()
    """What its checkpoint had been scored on when the check ended."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to send from an xdist worker to its controller."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckResult:
        """Invert `to_dict`."""
        return msgspec.convert(values, cls)


def upheld(results: list[CheckResult]) -> list[CheckResult]:
    """Return the results, keeping a statistical fail only if Holm's adjustment upholds it.

    The adjustment covers each checkpoint's statistical checks: with several, some fail by chance
    more often than alpha. A pass needs no adjustment: all must pass, and the chance that all do is
    at most that of any single one (Berger 1982, intersection-union tests).
    """
    family: dict[str, list[int]] = {}
    for index, result in enumerate(results):
        if result.verdict.p_value is not None:
            family.setdefault(result.checkpoint, []).append(index)
    found = list(results)
    for indices in family.values():
        adjusted = holm([results[i].verdict.p_value or 0.0 for i in indices])
        for index, p in zip(indices, adjusted, strict=True):
            verdict = results[index].verdict
            if verdict.outcome != "fail" or verdict.known_failure or p <= ALPHA:
                continue
            why = (
                f"as one of {len(indices)} statistical checks this may be chance (Holm's p {p:.2g})"
            )
            verdict = dataclasses.replace(
                verdict, outcome="inconclusive", detail=f"{verdict.detail}; {why}"
            )
            found[index] = dataclasses.replace(results[index], verdict=verdict)
    return found


def probes_of(results: Iterable[CheckResult]) -> list[ScoredProbe]:
    """Return each probe that was scored for some of the results, by name."""
    found = {probe for result in results for probe in result.probes}
    return sorted(found, key=lambda probe: (probe.name, probe.sha256))


def overall(results: list[CheckResult]) -> Outcome:
    """Return the verdict on a whole run; a run without a check is "not-run"."""
    return worst([result.verdict.counted for result in results])

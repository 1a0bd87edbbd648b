"""Verdicts: what a check says, with the number, the allowance and where it went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from quantgate.audit.finding import Finding
from quantgate.errors import printable
from quantgate.subject.passage import Passage

if TYPE_CHECKING:
    from quantgate.measuring.measurement import Measurement

Outcome = Literal["pass", "fail", "inconclusive", "not-run"]

# What a limit limits, for those that noise moves: |mean Δ|, mean |Δ|, max |Δ|, mean KLD, or what a
# task is measured by.
Statistic = Literal["mean", "mean_abs", "max_abs", "kld", "metric"]

# From worst to best: the verdict on many checks is the worst among them.
SEVERITY: tuple[Outcome, ...] = ("fail", "not-run", "inconclusive", "pass")


# vLLM gives the head of a reward model no name, so `ignore` cannot keep it from being quantized.
REPAIRED = "{}: quantgate keeps this head whole; stock vLLM would load it as quantized layers"


@dataclass(frozen=True)
class Deviation:
    """One number beside what it is allowed to be.

    >>> found = Deviation("max |Δ log-prob|", 0.25, 1e-5)
    >>> found.exceeded
    True
    >>> print(found)
    max |Δ log-prob| is 0.25 nat, allowed <= 1e-05
    """

    what: str
    measured: float
    allowed: float
    unit: str = "nat"
    two_sided: bool = False
    statistic: Statistic | None = None
    """What noise moves of it; None for what noise does not move."""
    floor: float | None = None
    """How far noise alone moves it."""

    @property
    def exceeded(self) -> bool:
        """Whether the number is outside; NaN always is."""
        value = abs(self.measured) if self.two_sided else self.measured
        return not value <= self.allowed

    def __str__(self) -> str:
        relation = "within ±" if self.two_sided else "<= "
        floor = "" if self.floor is None else f", noise floor {self.floor:.3g}"
        measured = f"{self.measured:.6g} {self.unit}".rstrip()
        return f"{self.what} is {measured}, allowed {relation}{self.allowed:.6g}{floor}"


@dataclass(frozen=True)
class WorstToken:
    """A token at which two measurements differ most."""

    place: str
    """Its document and position."""
    passage: Passage
    column: str
    """The label, or number, of a pooling output; "" of a log-probability."""
    ours: float
    theirs: float

    def __str__(self) -> str:
        of = f" {self.column}" if self.column else ""
        return f"{self.place} {self.passage}{of}: {self.ours:.6f} against {self.theirs:.6f}"


@dataclass(frozen=True)
class Profile:
    """Where two measurements differ: for a report's charts and tables."""

    by_position: tuple[tuple[int, float, float], ...] = ()
    """Of each bin of positions its first one, and the mean and largest |Δ| there."""
    worst: tuple[WorstToken, ...] = ()
    kld: tuple[int, ...] = ()
    """How many tokens have a KL divergence in each decade, from `KLD_DECADES[0]` on."""


# The powers of ten that bound a profile's KL divergences, in nat; what is beyond joins the end.
KLD_DECADES = (-10, 2)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check of one checkpoint.

    The first deviation is the one that a table shows. `detail` is one sentence; `evidence` are the
    lines below it in a failure message, and `next_step` its last one.
    """

    outcome: Outcome
    detail: str
    deviations: tuple[Deviation, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    """What was measured besides, by name, in nat: for tables."""
    n: int | None = None
    dtype: str | None = None
    """What was served, as torch calls it; None where nothing was."""
    mde: float | None = None
    """The effect that would be found in 8 of 10 such runs, in the first deviation's unit."""
    unpaired_mde: float | None = None
    """The same, had the two sides been measured on different text."""
    p_value: float | None = None
    """Of a statistical check: how likely such a value is where it is within its margin, at most.
    Small in a fail, and adjusted by `results.upheld` for a checkpoint's several such checks."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """Kernel that served each kind of layer, read from the loaded model."""
    emulated: tuple[str, ...] = ()
    """The kernels among them that are emulations."""
    repaired: tuple[str, ...] = ()
    """The heads that a patch of quantgate's keeps whole, where vLLM alone would not."""
    findings: tuple[Finding, ...] = ()
    """What the audit found, errors first."""
    evidence: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    since_golden: str = ""
    """What the environment has otherwise than when the golden was taken."""
    next_step: str = ""
    attribution: str = ""
    """Whose fault a failure is, and what shows it: "ENGINE: …"."""
    known_failure: str = ""
    """Why a failure was expected, and where that is followed up; it does not count."""

    @property
    def counted(self) -> Outcome:
        """What this verdict adds to the one on a whole run."""
        return "pass" if self.known_failure else self.outcome

    @property
    def on_processor(self) -> bool:
        """Whether kernels of vLLM's CPU platform computed what was judged."""
        return any(name.startswith("CPU") for name in self.kernels.values())

    def message(self, subject: str) -> str:
        """Return the text of a failure: cause, evidence, next step."""
        lines = [f"{subject}: {self.outcome.upper()}: {self.detail}"]
        lines += [f"  {deviation}" for deviation in self.deviations]
        lines += self._sample()
        if self.attribution:
            lines.append(f"  fault      {self.attribution}")
        lines += [f"  {line}" for line in self.evidence]
        if self.emulated:
            lines.append(
                f"  emulated   {', '.join(self.emulated)}: no evidence about a real kernel"
            )
        if self.repaired:
            lines.append(f"  repaired   {REPAIRED.format(', '.join(self.repaired))}")
        if self.since_golden:
            lines.append(f"  since then {self.since_golden}")
        if self.next_step:
            lines.append(f"  next       {self.next_step}")
        return "\n".join(map(printable, lines))

    def _sample(self) -> list[str]:
        if self.n is None:
            return []
        line = f"  n          {self.n:,}"
        if self.mde is not None:
            line += f", MDE {self.mde:.3g}"
        if self.unpaired_mde is not None:
            line += f" (unpaired {self.unpaired_mde:.3g})"
        if self.p_value is not None:
            line += f", p of a fail {self.p_value:.3g}"
        return [line]


def verdict_on(
    engine: Measurement,
    outcome: Outcome,
    detail: str,
    deviations: Sequence[Deviation] = (),
    **more: Any,
) -> Verdict:
    """Return the verdict on what an engine gave: the one place where such a verdict is built.

    How much there is of it, its dtype and its kernels come from the measurement; `more` are
    `Verdict`'s other fields, or another `n`.
    """
    held: dict[str, Any] = {
        "n": len(engine.values),
        "dtype": engine.provenance.dtype,
        "kernels": engine.provenance.kernels,
        "emulated": engine.provenance.emulated,
        "repaired": engine.provenance.repaired,
    }
    return Verdict(outcome, detail, tuple(deviations), **(held | more))


def one_sided(lower: float, upper: float, margin: float) -> Outcome:
    """Return what confidence bounds say of "at most `margin`": a tie decides nothing.

    >>> one_sided(0.01, 0.04, margin=0.05)
    'pass'
    >>> one_sided(0.01, 0.06, margin=0.05)
    'inconclusive'
    """
    return "pass" if upper < margin else "fail" if lower > margin else "inconclusive"


def not_run(detail: str, next_step: str = "") -> Verdict:
    """Return the verdict of a selected check that did not happen.

    >>> print(not_run("no probe has steps", "give one that has").message("my-model steps"))
    my-model steps: NOT-RUN: no probe has steps
      next       give one that has
    """
    return Verdict("not-run", detail, next_step=next_step)


def worst(outcomes: list[Outcome]) -> Outcome:
    """Return the verdict on many checks; on none at all it is "not-run"."""
    return min(outcomes, key=SEVERITY.index, default="not-run")

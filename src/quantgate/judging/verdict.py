"""Verdicts: the outcome of a check, with the number, its limit and where it went wrong."""

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

# The limited statistics that noise affects: |mean Δ|, mean |Δ|, max |Δ|, mean KLD, or a task's
# metric.
Statistic = Literal["mean", "mean_abs", "max_abs", "kld", "metric"]

# From worst to best: the verdict on many checks is the worst among them.
SEVERITY: tuple[Outcome, ...] = ("fail", "not-run", "inconclusive", "pass")


# vLLM gives the head of a reward model no name, so `ignore` cannot keep it from being quantized.
REPAIRED = "{}: quantgate keeps this head whole; stock vLLM would load it as quantized layers"


@dataclass(frozen=True)
class Deviation:
    """One number with its limit.

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
    """The statistic that noise affects; None if noise does not affect it."""
    floor: float | None = None
    """How far noise alone moves it."""

    @property
    def exceeded(self) -> bool:
        """Whether the number is beyond its limit; NaN always is."""
        return not self._value <= self.allowed

    @property
    def used(self) -> float:
        """The share of its allowance that it takes; 0 where it may be nothing else than 0."""
        return max(self._value, 0.0) / self.allowed if self.allowed else 0.0

    @property
    def _value(self) -> float:
        return abs(self.measured) if self.two_sided else self.measured

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
    """The label, or number, of a pooling output; "" for a log-probability."""
    ours: float
    theirs: float

    def __str__(self) -> str:
        of = f" {self.column}" if self.column else ""
        return f"{self.place} {self.passage}{of}: {self.ours:.6f} against {self.theirs:.6f}"


@dataclass(frozen=True)
class Profile:
    """Where two measurements differ, for a report's charts and tables."""

    by_position: tuple[tuple[int, float, float], ...] = ()
    """For each bin of positions: its first position, and the mean and largest |Δ| in it."""
    worst: tuple[WorstToken, ...] = ()
    kld: tuple[int, ...] = ()
    """The number of tokens with a KL divergence in each decade, from `KLD_DECADES[0]` on."""


# The powers of ten that bound a profile's KL divergences, in nat; values beyond count at the end.
KLD_DECADES = (-10, 2)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check of one checkpoint.

    Tables show the first deviation. `detail` is one sentence; `evidence` holds the lines below it
    in a failure message, and `next_step` is the last line.
    """

    outcome: Outcome
    detail: str
    deviations: tuple[Deviation, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further measured figures, by name, in nat, for tables."""
    n: int | None = None
    dtype: str | None = None
    """The served dtype's torch name; None if nothing was served."""
    mde: float | None = None
    """The effect that 8 of 10 such runs would detect, in the first deviation's unit."""
    unpaired_mde: float | None = None
    """The same, had the two sides been measured on different text."""
    p_value: float | None = None
    """For a statistical check, the p-value of the observed value if the true one is within its
    margin. Small in a fail; `results.upheld` adjusts it for a checkpoint's several such checks."""
    kernels: Mapping[str, str] = field(default_factory=dict)
    """The kernel that served each kind of layer, read from the loaded model."""
    emulated: tuple[str, ...] = ()
    """The kernels among them that are emulations."""
    repaired: tuple[str, ...] = ()
    """The heads that unpatched vLLM would load wrong, and that quantgate's patch repairs."""
    findings: tuple[Finding, ...] = ()
    """What the audit found, errors first."""
    evidence: tuple[str, ...] = ()
    profile: Profile = field(default_factory=Profile)
    since_golden: str = ""
    """How the environment differs from the one in which the golden was taken."""
    next_step: str = ""
    attribution: str = ""
    """The component at fault and the evidence: "ENGINE: …"."""
    known_failure: str = ""
    """Why a failure was expected, and where that is tracked; it does not count."""

    @property
    def headline(self) -> Deviation | None:
        """The number that a table shows of it; None if nothing was measured."""
        return self.deviations[0] if self.deviations else None

    @property
    def counted(self) -> Outcome:
        """The outcome that counts towards the whole run's verdict."""
        return "pass" if self.known_failure else self.outcome

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
    """Return the verdict on an engine's measurement: the only place that builds such verdicts.

    The number of values, the dtype and the kernels come from the measurement; `more` gives
    `Verdict`'s other fields, or a different `n`.
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
    """Return the outcome of "at most `margin`" by confidence bounds: a tie is inconclusive.

    >>> one_sided(0.01, 0.04, margin=0.05)
    'pass'
    >>> one_sided(0.01, 0.06, margin=0.05)
    'inconclusive'
    """
    return "pass" if upper < margin else "fail" if lower > margin else "inconclusive"


def not_run(detail: str, next_step: str = "") -> Verdict:
    """Return the verdict of a selected check that did not run.

    >>> print(not_run("no probe has steps", "give one that has").message("my-model steps"))
    my-model steps: NOT-RUN: no probe has steps
      next       give one that has
    """
    return Verdict("not-run", detail, next_step=next_step)


def worst(outcomes: list[Outcome]) -> Outcome:
    """Return the verdict on many checks; for none it is "not-run"."""
    return min(outcomes, key=SEVERITY.index, default="not-run")

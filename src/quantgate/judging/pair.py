"""Two measurements of one probe, and verdicts on their difference."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from quantgate.judging.evidence import kernels_line, profile_of, where_they_differ
from quantgate.judging.stats import ALPHA, FEWEST_CLUSTERS, PairedMean, unpaired_mean
from quantgate.judging.verdict import Deviation, Outcome, Statistic, Verdict, verdict_on
from quantgate.measuring.measurement import Measurement, difference
from quantgate.subject.task import GENERATE, is_classifier, quantity_of

if TYPE_CHECKING:
    from quantgate.subject.probe import Probe


@dataclass(frozen=True)
class Pair:
    """An engine's measurement, and the one it is compared with."""

    ours: Measurement
    theirs: Measurement
    probe: Probe

    @functools.cached_property
    def delta(self) -> NDArray[np.float64]:
        """Ours minus theirs [n] or [n, D]."""
        return difference(self.ours, self.theirs)

    @property
    def size(self) -> NDArray[np.float64]:
        """|Δ| [n] or [n, D]."""
        return np.abs(self.delta)

    def agreement(self, theirs: str) -> str:
        """Describe how far the engine is from `theirs`, e.g. "reference"."""
        unit = " nat per token" if self.probe.task == GENERATE else ""
        text = (
            f"engine and {theirs} differ by {self.size.mean():.3g}{unit}, {self.size.max():.3g} "
            "at most"
        )
        if is_classifier(self.probe.task):
            a, b = self.ours.top1, self.theirs.top1
            text += f"; {np.count_nonzero(a != b)} of {len(a)} labels flip"
        return text

    def unpaired_mde(self) -> float:
        """Return the detectable effect had the two been measured on different text."""
        unpaired = unpaired_mean(self.ours.logprob, self.theirs.logprob, self.probe.documents)
        return unpaired.minimum_detectable_effect()

    def verdict(
        self,
        outcome: Outcome,
        detail: str,
        deviations: Sequence[Deviation],
        mde: float | None = None,
    ) -> Verdict:
        """Return the verdict on this pair; non-finite values fail, whatever `outcome` is."""
        quantity = quantity_of(self.probe.task)
        nonfinite = Deviation(f"non-finite {quantity}s", self.ours.nonfinite, 0, "values")
        if nonfinite.exceeded:
            outcome, deviations = "fail", [nonfinite, *deviations]
        profile = profile_of(self.ours, self.theirs, self.probe)
        evidence: tuple[str, ...] = ()
        if outcome != "pass":
            found = where_they_differ(self.ours, self.theirs, self.probe, profile)
            evidence = (*found, *kernels_line(self.ours))
        return verdict_on(
            self.ours,
            outcome,
            detail,
            deviations,
            figures=figures_of(self.size, self.probe),
            mde=mde,
            evidence=evidence,
            profile=profile,
        )

    def statistical_verdict(
        self, outcome: Outcome, detail: str, deviation: Deviation, paired: PairedMean, margin: float
    ) -> Verdict:
        """Return the verdict of a test on a mean; too few documents make it inconclusive."""
        if paired.clusters < FEWEST_CLUSTERS and outcome == "pass":
            outcome = "inconclusive"
            detail += f"; {paired.clusters} documents are too few, {FEWEST_CLUSTERS} are needed"
        elif outcome == "inconclusive":
            margins = (margin, -margin) if deviation.two_sided else (margin,)
            detail += f"; {_tokens_wanted(paired, margins)}"
        return self.verdict(outcome, detail, [deviation], paired.minimum_detectable_effect())


def upper_bound(what: str, paired: PairedMean, margin: float, statistic: Statistic) -> Deviation:
    """Return the upper confidence bound of a mean with its margin, in nat per token."""
    what = f"upper {1 - ALPHA:.0%} bound of {what}"
    return Deviation(what, paired.bounds()[1], margin, "nat/token", statistic=statistic)


def deviation_of(
    kind: Literal["mean", "max"],
    measured: float,
    allowed: float,
    probe: Probe,
    *,
    noisy: bool = True,
) -> Deviation:
    """Return a mean or largest |Δ| of a probe's quantity with its limit."""
    what = f"{kind} |Δ {quantity_of(probe.task)}|"
    unit = "nat" if probe.task == GENERATE else ""
    statistic: Statistic = "mean_abs" if kind == "mean" else "max_abs"
    return Deviation(what, measured, allowed, unit, statistic=statistic if noisy else None)


def figures_of(size: NDArray[np.float64], probe: Probe) -> dict[str, float]:
    """Return the mean and the largest of |Δ|, by name."""
    quantity = quantity_of(probe.task)
    return {
        f"mean |Δ {quantity}|": float(np.mean(size)),
        f"max |Δ {quantity}|": float(size.max()),  # NaN wins
    }


def _tokens_wanted(paired: PairedMean, margins: tuple[float, ...]) -> str:
    """Describe how many tokens would separate the mean from all `margins`; these are too few."""
    wanted = [paired.tokens_to_decide(margin) for margin in margins]
    numbers = [number for number in wanted if number is not None]
    if len(numbers) < len(wanted):
        return f"{paired.n} tokens cannot decide, and more will not: the mean is at its margin"
    return f"{paired.n} tokens cannot decide, about {max(*numbers, paired.n + 1)} would"

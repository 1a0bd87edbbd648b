"""Paired statistics over per-token differences, clustered by document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
POWER = 0.8
# Below this many clusters the cluster-robust standard error is not to be relied on (Cameron and
# Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, section VI).
FEWEST_CLUSTERS = 30


@dataclass(frozen=True)
class PairedMean:
    """The mean of paired differences d [n], in their unit, with a cluster-robust error."""

    mean: float
    standard_error: float
    n: int
    clusters: int

    @property
    def degrees_of_freedom(self) -> int:
        """G - 1."""
        return self.clusters - 1

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the one-sided 1 - alpha confidence bounds, lower and upper.

        Together they are the 1 - 2·alpha interval of the two one-sided tests (Schuirmann 1987).
        """
        half = self._t(1 - alpha) * self.standard_error
        return self.mean - half, self.mean + half

    def minimum_detectable_effect(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """Return the shift of the mean that a one-sided test at `alpha` finds with `power`."""
        return (self._t(1 - alpha) + self._t(power)) * self.standard_error

    def tokens_to_decide(self, margin: float, alpha: float = ALPHA) -> int:
        """Return how many tokens would put the mean, as it is, clear of `margin`."""
        gap = abs(margin - self.mean)
        if gap == 0.0:
            return np.iinfo(np.int64).max
        return int(np.ceil(self.n * (self._t(1 - alpha) * self.standard_error / gap) ** 2))

    def _t(self, quantile: float) -> float:
        from scipy import stats

        return float(stats.t.ppf(quantile, self.degrees_of_freedom))


def paired_mean(difference: NDArray[Any], clusters: NDArray[Any]) -> PairedMean:
    """Return the mean of `difference` [n] with the CR1 standard error over `clusters` [n].

    With u_g the sum of residuals in cluster g of G, the variance is G / (G - 1) · Σ u_g² / n²
    (Liang and Zeger 1986, with the CR1 correction of Cameron and Miller 2015, for a mean).
    """
    d = np.asarray(difference, dtype=np.float64)
    if d.shape != clusters.shape or d.ndim != 1:
        raise ValueError(f"difference {d.shape} and clusters {clusters.shape} must be one [n].")
    _, index = np.unique(clusters, return_inverse=True)
    return clustered_mean(np.bincount(index, weights=d), np.bincount(index))


def clustered_mean(sums: NDArray[Any], counts: NDArray[Any]) -> PairedMean:
    """Return the mean over all of G clusters' members, of which sums [G] and counts [G] are known.

    Its CR1 standard error is `paired_mean`'s.
    """
    if len(sums) < 2:
        raise ValueError(f"a cluster-robust error needs 2 clusters at least, got {len(sums)}.")
    n = int(counts.sum())
    mean = float(sums.sum()) / n
    residuals = sums - counts * mean
    variance = len(sums) / (len(sums) - 1) * float(residuals @ residuals) / n**2
    return PairedMean(mean, float(np.sqrt(variance)), n, len(sums))

"""Paired statistics over per-token differences, clustered by document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALPHA = 0.05
POWER = 0.8
# How often a correct checkpoint may exceed the rounding allowance by chance.
RARE = 1e-3
# Below this many clusters the cluster-robust standard error is unreliable (Cameron and
# Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, section VI).
FEWEST_CLUSTERS = 30


@dataclass(frozen=True)
class PairedMean:
    """The mean of paired differences d [n], in their unit, with two standard errors."""

    mean: float
    clustered_error: float
    """Cluster-robust: allows any dependence within a document."""
    n: int
    clusters: int
    block_error: float = 0.0
    """By a stationary block bootstrap inside documents: more reliable than the other for a few long
    ones. 0 if the order of tokens is unknown."""

    @property
    def standard_error(self) -> float:
        """The larger of the two."""
        return max(self.clustered_error, self.block_error)

    @property
    def degrees_of_freedom(self) -> int:
        """G - 1."""
        return self.clusters - 1

    def bounds(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Return the one-sided 1 - alpha confidence bounds, lower and upper.

        Together they are the 1 - 2·alpha interval of the two one-sided tests (Schuirmann 1987).
        """
        half = self.quantile(1 - alpha) * self.standard_error
        return self.mean - half, self.mean + half

    def p_below(self, margin: float) -> float:
        """Return the p-value of "the true mean is at least `margin`": small if it is below."""
        return self._tail((self.mean - margin), below=True)

    def p_above(self, margin: float) -> float:
        """Return the p-value of "the true mean is at most `margin`": small if it is above."""
        return self._tail((self.mean - margin), below=False)

    def minimum_detectable_effect(self, alpha: float = ALPHA, power: float = POWER) -> float:
        """Return the shift of the mean that a one-sided test at `alpha` detects with `power`.

        (t_{1-α} + t_{power}) · SE (Bloom 1995, "Minimum Detectable Effects").
        """
        return (self.quantile(1 - alpha) + self.quantile(power)) * self.standard_error

    def tokens_to_decide(self, margin: float, alpha: float = ALPHA) -> int | None:
        """Return how many tokens would separate the mean, as observed, from `margin`.

        None if the mean is so close to it that no number would.
        """
        gap = abs(margin - self.mean)
        half = self.quantile(1 - alpha) * self.standard_error
        if gap <= half * np.finfo(np.float64).eps:
            return None
        return int(self.n * (half / gap) ** 2) + 1  # at a whole number the bound is on the margin

    def _tail(self, distance: float, *, below: bool) -> float:
        from scipy import stats

        if self.standard_error == 0.0:
            return float(distance >= 0 if below else distance <= 0)
        t = distance / self.standard_error
        return float((stats.t.cdf if below else stats.t.sf)(t, self.degrees_of_freedom))

    def quantile(self, quantile: float) -> float:
        """Return the quantile of Student's t with these degrees of freedom."""
        from scipy import stats

        return float(stats.t.ppf(quantile, self.degrees_of_freedom))


def paired_mean(difference: NDArray[Any], clusters: NDArray[Any]) -> PairedMean:
    """Return the mean of `difference` [n], in the order of the text, over `clusters` [n].

    With u_g the sum of residuals in cluster g of G, the clustered variance is G / (G - 1) · Σ u_g²
    / n² (Liang and Zeger 1986, with the CR1 correction of Cameron and Miller 2015, for a mean).

    >>> cost = paired_mean(np.array([0.1, 0.3, 0.1, 0.3]), np.array(["a", "a", "b", "b"]))
    >>> cost.n, cost.clusters, round(cost.mean, 3)
    (4, 2, 0.2)
    """
    d = np.asarray(difference, dtype=np.float64)
    if d.shape != clusters.shape or d.ndim != 1:
        raise ValueError(f"difference {d.shape} and clusters {clusters.shape} must be one [n].")
    _, index = np.unique(clusters, return_inverse=True)
    found = clustered_mean(np.bincount(index, weights=d), np.bincount(index))
    order = np.argsort(index, kind="stable")
    documents = np.split(d[order] - found.mean, np.cumsum(np.bincount(index))[:-1])
    variance = sum(stationary_variance(document) for document in documents) / len(d) ** 2
    return PairedMean(found.mean, found.clustered_error, found.n, found.clusters, variance**0.5)


def rounding_allowance(
    sizes: NDArray[Any], clusters: NDArray[Any], factor: float, alpha: float = RARE
) -> float:
    """Return the largest mean allowed for errors like those whose sizes [n] are given.

    `factor` times their mean, plus the amount by which another sample of n such errors, with the
    same clusters, may exceed it: the difference of two means of one distribution has √2 times a
    mean's standard error. Few values estimate rounding poorly: the mean of 80 independent ones is
    off by 8 %.
    """
    found = paired_mean(sizes, clusters)
    error = np.sqrt(2) * found.standard_error
    return float(factor * (found.mean + found.quantile(1 - alpha) * error))


def unpaired_mean(one: NDArray[Any], other: NDArray[Any], clusters: NDArray[Any]) -> PairedMean:
    """Return mean(one) - mean(other) [n] as if the two came from different texts of this size.

    Their variances add up. Uses the smaller sample's degrees of freedom, G - 1; Welch's (1947) are
    never fewer.
    """
    a, b = paired_mean(one, clusters), paired_mean(other, clusters)
    error = float(np.hypot(a.standard_error, b.standard_error))
    return PairedMean(a.mean - b.mean, error, a.n, a.clusters)


def documents_to_decide(
    difference: NDArray[Any], clusters: NDArray[Any], margin: float
) -> int | None:
    """Return after how many documents, shuffled, the mean is known to be on one side of `margin`.

    By `confidence_sequence`, so that stopping there is as safe as going on; None if it never is
    known.
    """
    _, index = np.unique(clusters, return_inverse=True)
    order = np.random.default_rng(0).permutation(index.max() + 1)
    sums, sizes = np.bincount(index, weights=difference)[order], np.bincount(index)[order]
    lower, upper = confidence_sequence(sums / sizes, sizes)
    clear = np.flatnonzero((lower > margin) | (upper < margin))
    return int(clear[0]) + 1 if len(clear) else None


def clustered_mean(sums: NDArray[Any], counts: NDArray[Any]) -> PairedMean:
    """Return the mean over all members of G clusters, from their sums [G] and counts [G].

    Its CR1 standard error is the same as `paired_mean`'s.
    """
    if len(sums) < 2:
        raise ValueError(f"a cluster-robust error needs 2 clusters at least, got {len(sums)}.")
    n = int(counts.sum())
    mean = float(sums.sum()) / n
    residuals = sums - counts * mean
    variance = len(sums) / (len(sums) - 1) * float(residuals @ residuals) / n**2
    return PairedMean(mean, float(np.sqrt(variance)), n, len(sums))


def stationary_variance(residuals: NDArray[Any]) -> float:
    """Return the variance of the sum of `residuals` [m] under the stationary block bootstrap.

    In closed form, without resampling: m·Σ_k w_k C_k over all lags k, with C_k the autocovariance,
    w_k = (1 - k/m)(1 - p)^k + (k/m)(1 - p)^(m-k) for both signs of k (Politis and Romano 1994,
    lemma 1) and blocks of mean length 1/p = m^(1/3).
    """
    m = len(residuals)
    length = 1 << int(np.ceil(np.log2(2 * m)))
    spectrum = np.abs(np.fft.rfft(residuals, length)) ** 2
    covariance = np.fft.irfft(spectrum, length)[:m] / m
    k = np.arange(m)
    keep = 1 - 1 / max(1.0, m ** (1 / 3))
    weights = (1 - k / m) * keep**k + (k / m) * keep ** (m - k)
    return max(0.0, m * float(covariance[0] + 2 * (weights[1:] @ covariance[1:])))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple testing, in their order (Holm 1979)."""
    count = len(p_values)
    adjusted, largest = [0.0] * count, 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def confidence_sequence(
    means: NDArray[Any], sizes: NDArray[Any], alpha: float = ALPHA
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return lower and upper bounds [G] of the token-weighted mean after each document.

    All of them hold at once with probability 1 - 2·alpha, each side with 1 - alpha, so it is valid
    to stop at any document: the asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha,
    Kennedy and Ramdas ("Time-uniform central limit theory", 2024, theorem 2.2), tightest after
    `FEWEST_CLUSTERS` documents; before that the bounds are infinite. `means` and `sizes` are each
    document's mean difference and number of tokens [G], in the order of inspection.
    """
    count = np.arange(1, len(means) + 1)
    weights = np.cumsum(sizes)
    centre = np.cumsum(means * sizes) / weights
    # The weighted mean is the mean of y_g = m_g·d_g / mean(m), up to its own running centre.
    spread = np.cumsum((sizes * means) ** 2) - 2 * centre * np.cumsum(sizes**2 * means)
    spread = (spread + centre**2 * np.cumsum(sizes**2)) / count
    deviation = np.sqrt(np.maximum(spread, 0.0)) / (weights / count)
    rho2 = (-2 * np.log(alpha) + np.log(-2 * np.log(alpha) + 1)) / FEWEST_CLUSTERS
    scaled = count * rho2 + 1
    half = deviation * np.sqrt(
        2 * scaled / (count**2 * rho2) * np.log(1 + np.sqrt(scaled) / (2 * alpha))
    )
    half = np.where(count < FEWEST_CLUSTERS, np.inf, half)
    return centre - half, centre + half

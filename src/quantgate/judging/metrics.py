"""Task metrics: entity F1, step accuracy, ranking and retrieval accuracy.

Each metric is computed on a sample of documents, so that a bootstrap can give its standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.judging.stats import ALPHA, POWER

if TYPE_CHECKING:
    from quantgate.subject.probe import Probe

OUTSIDE = "O"  # the label of tokens outside entities
RESAMPLES = 1000

Sample = NDArray[np.int64]
"""Indices into the probe's documents [G], some more than once."""


@dataclass(frozen=True)
class Metric:
    """A number between 0 and 1 for a sample of documents; 1 is best."""

    name: str
    of: Callable[[Sample], float]


@dataclass(frozen=True)
class PairedLoss:
    """How much worse a metric is than the base's on the same documents."""

    loss: float
    standard_error: float
    documents: int

    @property
    def upper(self) -> float:
        """The one-sided 1 - alpha upper bound of the loss."""
        return self.loss + self._half()

    @property
    def lower(self) -> float:
        """The one-sided 1 - alpha lower bound of the loss."""
        return self.loss - self._half()

    def p_above(self, margin: float) -> float:
        """Return the p-value of "the true loss is at most `margin`"."""
        from scipy.stats import norm

        return float(norm.sf((self.loss - margin) / self.standard_error))

    def minimum_detectable_effect(self) -> float:
        """Return the loss that a one-sided test at alpha detects with the default power."""
        from scipy.stats import norm

        return float((norm.ppf(1 - ALPHA) + norm.ppf(POWER)) * self.standard_error)

    def _half(self) -> float:
        from scipy.stats import norm

        return float(norm.ppf(1 - ALPHA) * self.standard_error)


def paired_loss(metric: Metric, base: Metric, documents: int) -> PairedLoss:
    """Return the loss of `metric` against `base`, with its standard error.

    The error combines a bootstrap over documents, with both metrics on the same resamples (Efron
    and Tibshirani 1993, chapter 6), and, because a sample without changes does not rule them out,
    the error from half a document more in each cell of the table of changes, 1 / (G + 2) (Agresti
    and Min, "Simple improved confidence intervals for comparing matched proportions", 2005).
    """
    from scipy.stats import bootstrap

    def loss(sample: Sample) -> float:
        return base.of(sample) - metric.of(sample)

    every = np.arange(documents)
    rng = np.random.default_rng(0)
    resampled = bootstrap(
        (every,), loss, n_resamples=RESAMPLES, method="percentile", vectorized=False, rng=rng
    )
    error = float(np.hypot(resampled.standard_error, 1 / (documents + 2)))
    return PairedLoss(loss(every), error, documents)


def entity_f1(found: NDArray[Any], expected: NDArray[Any], probe: Probe, outside: int) -> Metric:
    """Return the F1 of whole entities, for labels [n] found and expected (NaN: not judged).

    An entity is a run of tokens with one label; it is found if its first token, last token and
    label all match (the exact match of CoNLL 2003).
    """
    counts = []
    for rows in _rows_by_document(probe):
        judged = rows[~np.isnan(expected[rows])]
        ours = _entities(found[judged], outside)
        theirs = _entities(expected[judged], outside)
        counts.append((len(ours & theirs), len(ours) + len(theirs)))
    return Metric("entity F1", _ratio_of_sums(2 * np.array(counts)[:, 0], np.array(counts)[:, 1]))


def _entities(labels: NDArray[Any], outside: int) -> set[tuple[int, int, int]]:
    """Return the runs (first, last, label) of equal labels other than `outside`."""
    if not len(labels):
        return set()
    ends = np.flatnonzero(np.diff(labels)).tolist()
    firsts, lasts = [0, *(end + 1 for end in ends)], [*ends, len(labels) - 1]
    runs = zip(firsts, lasts, labels[firsts].astype(int).tolist(), strict=True)
    return {run for run in runs if run[2] != outside}


def accuracy(name: str, found: NDArray[Any], expected: NDArray[Any], probe: Probe) -> Metric:
    """Return the share of judged labels [n] that are right; NaN in `expected` is not judged."""
    judged = ~np.isnan(expected)
    right = judged & (found == expected)
    rows = _rows_by_document(probe)
    counts = np.array([(right[r].sum(), judged[r].sum()) for r in rows], np.float64)
    return Metric(name, _ratio_of_sums(counts[:, 0], counts[:, 1]))


def ranking_accuracy(scores: NDArray[Any], grades: NDArray[Any]) -> Metric:
    """Return the share of text pairs of different grade [G] in the right order; ties count half."""

    def of(sample: Sample) -> float:
        score, grade = scores[sample], grades[sample]
        better = grade[:, None] > grade[None, :]
        margin = np.sign(score[:, None] - score[None, :])[better]
        return float(np.mean((margin + 1) / 2)) if margin.size else 1.0

    return Metric("ranking accuracy", of)


def kendall_tau(scores: NDArray[Any], grades: NDArray[Any]) -> float:
    """Return Kendall's tau-b of two rankings of the same texts [G]."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, grades).statistic)


def retrieval_accuracy(similarity: NDArray[Any]) -> Metric:
    """Return the share of queries that find their own document, by similarity [queries,
    documents]."""
    found = similarity.argmax(axis=1) == np.arange(len(similarity))
    return Metric("retrieval accuracy", _ratio_of_sums(found, np.ones(len(found))))


def max_sim(queries: Sequence[NDArray[Any]], documents: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return ColBERT's similarities [queries, documents] of unit vectors, each [tokens, D].

    The sum over a query's tokens of their largest dot product with any document token (Khattab and
    Zaharia 2020, equation 3).
    """
    return np.array([[(q @ d.T).max(axis=1).sum() for d in documents] for q in queries])


def similarity(values: NDArray[Any], probe: Probe) -> NDArray[Any]:
    """Return max-sim scores [queries, documents] of raw embeddings."""
    unit = values.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    parts = np.split(unit, np.cumsum([window.scored for window in probe.windows])[:-1])
    queries, documents = (
        [part for part, w in zip(parts, probe.windows, strict=True) if w.stratum == kind]
        for kind in ("query", "document")
    )
    return max_sim(queries, documents)


def _rows_by_document(probe: Probe) -> list[NDArray[np.int64]]:
    return [np.flatnonzero(probe.documents == name) for name in dict.fromkeys(probe.documents)]


def _ratio_of_sums(numerator: NDArray[Any], denominator: NDArray[Any]) -> Callable[[Sample], float]:
    def of(sample: Sample) -> float:
        whole = denominator[sample].sum()
        return float(numerator[sample].sum() / whole) if whole else 1.0

    return of

"""Quality of pooling models: do they match the base at their task, on the same documents?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.judging import metrics
from quantgate.judging.budget import METRIC_LOSS
from quantgate.judging.metrics import Metric
from quantgate.judging.stats import ALPHA, FEWEST_CLUSTERS
from quantgate.judging.verdict import Deviation, Verdict, one_sided, verdict_on
from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, SEQUENCE_REWARD, label_names, quantity_of

if TYPE_CHECKING:
    from quantgate.measuring.case import Case
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.probe import Probe

Values = NDArray[np.floating[Any]]
# The metric of a checkpoint and of its base, and further figures for the report.
Compared = tuple[Metric, Metric, str]


def quality(case: Case) -> Verdict:
    """Judge the task's own metric against the base's: non-inferiority with a margin."""
    assert case.base is not None  # the check needs one
    probe = case.quality_probe
    engine, unquantized = case.for_quality, case.base.for_quality
    if engine.nonfinite or unquantized.nonfinite:
        counts = f"{engine.nonfinite} of the checkpoint's and {unquantized.nonfinite} of the base's"
        return verdict_on(engine, "fail", f"{counts} {quantity_of(probe.task)}s are not finite")
    ours, theirs, said = _compare(case, engine)
    every = np.arange(len(dict.fromkeys(probe.documents)))
    found = metrics.paired_loss(ours, theirs, len(every))
    override = case.checkpoint.budget.get("quality")
    margin = override.margin if override else METRIC_LOSS * theirs.of(every)
    outcome = one_sided(found.lower, found.upper, margin)
    why = ""
    if outcome == "inconclusive":
        why = f"; {found.documents} documents cannot decide"
    elif outcome == "pass" and found.documents < FEWEST_CLUSTERS:
        outcome = "inconclusive"
        why = f"; {found.documents} documents are too few, {FEWEST_CLUSTERS} are needed"
    bound = f"upper {1 - ALPHA:.0%} bound of the loss of {ours.name}"
    return verdict_on(
        engine,
        outcome,
        f"{ours.name} {theirs.of(every):.4f} → {ours.of(every):.4f}, a loss of {found.loss:.4g} "
        f"± {found.standard_error:.2g}; {said}{why}",
        [Deviation(bound, found.upper, margin, "", statistic="metric")],
        figures={
            ours.name: ours.of(every),
            f"{ours.name} of the base": theirs.of(every),
            f"± loss of {ours.name}": found.standard_error,
        },
        n=found.documents,
        p_value=found.p_above(margin),
        mde=found.minimum_detectable_effect(),
    )


def metric_of(case: Case, measured: Measurement) -> float:
    """Return the task's metric on outputs for the larger probe, as `quality` computes it."""
    metric, _, _ = _compare(case, measured)
    return metric.of(np.arange(len(dict.fromkeys(case.quality_probe.documents))))


def _compare(case: Case, engine: Measurement) -> Compared:
    assert case.base is not None
    checkpoint, probe, base = case.checkpoint, case.quality_probe, case.base.for_quality
    if checkpoint.task == EMBED:
        return _compare_embeddings(engine.values, base.values, probe)
    if checkpoint.task == SEQUENCE_REWARD:
        return _compare_rewards(engine.values[:, 0], base.values[:, 0], probe)
    names = [label_names(read_config(c.directory)) for c in (checkpoint, case.base.checkpoint)]
    found, of_base = (
        _as_probe_labels(measured, own, probe)
        for measured, own in zip((engine, base), names, strict=True)
    )
    if np.isnan(found).any() or np.isnan(of_base).any() or np.isnan(probe.expected).all():
        return _compare_with_base(engine, base, probe)
    said = f"{np.mean(found != of_base):.2%} of the labels are not the base's"
    if metrics.OUTSIDE not in probe.labels:
        ours, theirs = (
            metrics.accuracy("step accuracy", labels, probe.expected, probe)
            for labels in (found, of_base)
        )
        return ours, theirs, said
    outside = probe.labels.index(metrics.OUTSIDE)
    ours, theirs = (
        metrics.entity_f1(labels, probe.expected, probe, outside) for labels in (found, of_base)
    )
    return ours, theirs, said


def _compare_with_base(engine: Measurement, base: Measurement, probe: Probe) -> Compared:
    """Return how often labels equal the base's, for a probe without correct labels."""
    expected = base.top1.astype(np.float64)
    ours, theirs = (
        metrics.accuracy("agreement with the base", m.top1, expected, probe) for m in (engine, base)
    )
    return ours, theirs, "the probe does not know its labels"


def _compare_rewards(rewards: Values, of_base: Values, probe: Probe) -> Compared:
    grades = of_base if np.isnan(probe.expected).all() else probe.expected
    ours, theirs = (metrics.ranking_accuracy(r, grades) for r in (rewards, of_base))
    taus = [metrics.kendall_tau(r, grades) for r in (of_base, rewards)]
    return ours, theirs, f"Kendall's tau {taus[0]:.4f} → {taus[1]:.4f}"


def _compare_embeddings(values: Values, of_base: Values, probe: Probe) -> Compared:
    similar, of_base_similar = (metrics.similarity(v, probe) for v in (values, of_base))
    cosine, norm = _cosine_and_norm(values, of_base)
    tau = metrics.kendall_tau(similar.ravel(), of_base_similar.ravel())
    said = (
        f"cosine to the base's embeddings {cosine:.5f} on average, norms {norm:.4f} of the "
        f"base's, Kendall's tau of the max-sim scores {tau:.4f}"
    )
    ours, theirs = (metrics.retrieval_accuracy(s) for s in (similar, of_base_similar))
    return ours, theirs, said


def _as_probe_labels(
    measured: Measurement, names: tuple[str, ...], probe: Probe
) -> NDArray[np.float64]:
    """Return the labels found [n] in the probe's numbering, by name; NaN for unknown names.

    Unnamed labels are taken to be the probe's, in its order, if their number is the same.
    """
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    if unnamed and measured.values.shape[1] == len(probe.labels):
        names = probe.labels
    place = {name: float(i) for i, name in enumerate(probe.labels)}
    numbers = np.full(measured.values.shape[1], np.nan)
    width = min(len(names), len(numbers))
    numbers[:width] = [place.get(name, np.nan) for name in names[:width]]
    found: NDArray[np.float64] = numbers[measured.top1]
    return found


def _cosine_and_norm(ours: Values, theirs: Values) -> tuple[float, float]:
    """Return the mean cosine of rows [n, D] and the mean ratio of their norms."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    cosine = np.sum(a * b, axis=1) / (norms[0] * norms[1])
    return float(cosine.mean()), float(np.mean(norms[0] / norms[1]))

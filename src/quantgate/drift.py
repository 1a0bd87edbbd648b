"""Drift: is what is served what a person approved?

Takes what the check needs from the sources and hands it to the comparison.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantgate import compare, fidelity
from quantgate.budget import drift_margin
from quantgate.checkpoint import Checkpoint
from quantgate.golden import as_stored, judge_golden
from quantgate.measurement import Measurement
from quantgate.sources import Sources
from quantgate.task import GENERATE
from quantgate.verdict import Verdict

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion


def drift(
    sources: Sources, checkpoint: Checkpoint, dtype: str, snapshot: SnapshotAssertion, check: str
) -> Verdict:
    """Judge an engine in `dtype` ("serving" or torch's name) against the golden for `check`.

    float32 is judged token by token, any other dtype and any format that quantizes activations by
    a mean.
    """
    measured = sources.engine(checkpoint, dtype)
    probe = sources.probe_of(checkpoint)
    judge = partial(against, sources, checkpoint, dtype)
    return judge_golden(snapshot, checkpoint, probe, measured, check=check, compare=judge)


def against(
    sources: Sources, checkpoint: Checkpoint, dtype: str, engine: Measurement, golden: Measurement
) -> Verdict:
    """Judge what a golden would keep of an engine's measurement against what it keeps."""
    probe = sources.probe_of(checkpoint)
    if dtype == "float32" and not checkpoint.quantizes_activations:
        rounding = partial(fidelity.rounding, sources, checkpoint)
        return compare.drift_exact(engine, golden, probe, rounding=rounding)
    if probe.task == GENERATE:
        return compare.drift_mean(engine, golden, probe, margin=drift_margin(checkpoint))
    noise = _noise(sources, checkpoint, dtype)
    return compare.drift_rounding(engine, golden, probe, noise=noise)


def _noise(sources: Sources, checkpoint: Checkpoint, dtype: str) -> float:
    """Return how far rounding moves the reference's stored values, on average.

    To the serving dtype; or, in float32, where inputs are quantized, from float64.
    """
    rounded = sources.reference(checkpoint, "float64" if dtype == "float32" else dtype)
    exact = sources.reference(checkpoint, "float32")
    return compare.mean_absolute_difference(as_stored(rounded), as_stored(exact))

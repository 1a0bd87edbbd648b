"""Drift: is what is served what a person approved?

Takes what the check needs from the sources and hands it to the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from quantgate.formats import builds
from quantgate.judging import compare, fidelity
from quantgate.judging.budget import drift_margin
from quantgate.judging.golden import as_stored, judge_golden
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.measurement import Measurement
    from quantgate.measuring.sources import Sources
    from quantgate.subject.checkpoint import Checkpoint
    from quantgate.subject.probe import Probe


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
        return compare.drift_mean(
            engine,
            golden,
            probe,
            margin=drift_margin(checkpoint),
            moved=lambda: sum(_of_both(sources, checkpoint, dtype, golden, compare.mean_shift)),
        )
    # Half of what each may be off: within ROUNDING_FACTOR of the rounding of two that are alike.
    allowed = sum(_of_both(sources, checkpoint, dtype, golden, compare.within_rounding)) / 2
    return compare.drift_rounding(engine, golden, probe, allowed=allowed)


def _of_both(
    sources: Sources,
    checkpoint: Checkpoint,
    dtype: str,
    golden: Measurement,
    figure: Callable[[Measurement, Measurement, Probe], float],
) -> list[float]:
    """Return a figure of what rounding does to the reference: as it is done here, and there.

    Rounding to the serving dtype; or, in float32, where inputs are quantized, from float64.
    """
    probe, exact = sources.probe_of(checkpoint), sources.reference(checkpoint, "float32")
    rounded = "float64" if dtype == "float32" else dtype
    there = golden.provenance.arithmetic.get("bfloat16", builds.narrowing())
    return [
        figure(
            as_stored(sources.reference(checkpoint, rounded, narrowing=narrowing)),
            as_stored(exact),
            probe,
        )
        for narrowing in (builds.narrowing(), cast(builds.Narrowing, there))
    ]

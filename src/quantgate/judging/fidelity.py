"""Fidelity: does the engine compute what the checkpoint's weights say? With the fault, where not.

Takes what a check needs from the sources and hands it to the comparison.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from quantgate.formats.library_weights import largest_disagreement
from quantgate.judging import compare
from quantgate.judging.attribution import Suspects, attribute
from quantgate.measuring.precision import SERVING
from quantgate.measuring.whole_model import difference_from_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.sources import Sources
    from quantgate.subject.checkpoint import Checkpoint

    Check = Callable[[Sources, Checkpoint], Verdict]


def free_running(sources: Sources, checkpoint: Checkpoint, dtype: str) -> Verdict:
    """Judge the scores of a free-running engine, by the rule for its dtype."""
    if dtype == "float32":
        return float32(sources, checkpoint)
    return serving(sources, checkpoint, dtype)


def float32(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge float32 scores of a free-running engine."""
    verdict = _float32(sources, checkpoint)
    return attribute(verdict, _suspects(sources, checkpoint, "float32", _float32))


def serving(sources: Sources, checkpoint: Checkpoint, dtype: str = SERVING) -> Verdict:
    """Judge the scores of a free-running engine in the dtype that is served, or in another."""
    check = partial(_serving, dtype=dtype)
    return attribute(check(sources, checkpoint), _suspects(sources, checkpoint, dtype, check))


def replay(sources: Sources, checkpoint: Checkpoint, dtype: str) -> Verdict:
    """Judge every linear on the engine's own inputs."""
    engine, found = sources.engine(checkpoint, dtype), sources.replay(checkpoint, dtype)
    verdict = compare.replayed(engine, found, sources.probe_of(checkpoint))
    free_running = _float32 if dtype == "float32" else partial(_serving, dtype=dtype)
    return attribute(verdict, _suspects(sources, checkpoint, dtype, free_running))


def rounding(sources: Sources, checkpoint: Checkpoint) -> float:
    """Return how far float32 moves the reference's log-probs from float64's, at most, in nat."""
    return compare.largest_difference(
        sources.reference(checkpoint, "float64"), sources.reference(checkpoint, "float32")
    )


def divergence(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge whole distributions in the dtype that is served: those of the float32 reference."""
    engine = sources.engine(checkpoint, "serving")
    exact = sources.reference(checkpoint, "float32")
    rounded = sources.reference(checkpoint, "serving")
    probe = sources.probe_of(checkpoint)
    found, moved = (
        sources.divergence(exact, checkpoint, other, checkpoint, probe)
        for other in (engine, rounded)
    )
    return compare.divergence_from_reference(engine, exact, found, moved, probe)


def _float32(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    engine = sources.engine(checkpoint, "float32")
    reference = sources.reference(checkpoint, "float32")
    probe = sources.probe_of(checkpoint)
    if checkpoint.quantizes_activations:
        exact = sources.reference(checkpoint, "float64")
        return compare.fidelity_chaotic(engine, reference, exact, probe)
    return compare.fidelity_fp32(
        engine, reference, probe, rounding=lambda: rounding(sources, checkpoint)
    )


def _serving(sources: Sources, checkpoint: Checkpoint, dtype: str) -> Verdict:
    engine = sources.engine(checkpoint, dtype)
    reference = sources.reference(checkpoint, "float32")
    rounded = sources.reference(checkpoint, dtype)
    base_noise = None
    if (base := checkpoint.base_checkpoint) is not None:
        base_noise = compare.mean_absolute_difference(
            sources.engine(base, dtype), sources.reference(base, "float32")
        )
    probe = sources.probe_of(checkpoint)
    return compare.fidelity_serving(engine, reference, rounded, probe, base_noise=base_noise)


def _suspects(sources: Sources, checkpoint: Checkpoint, dtype: str, check: Check) -> Suspects:
    base = checkpoint.base_checkpoint
    return Suspects(
        engine=sources.engine(checkpoint, dtype),
        own=sources.reference(checkpoint, "float32"),
        library=lambda: sources.reference(checkpoint, "float32", "library"),
        disagreement=lambda: largest_disagreement(checkpoint.directory),
        base=None if base is None else lambda: check(sources, base),
        replay=lambda: sources.replay(checkpoint, dtype),
        whole=lambda: difference_from_whole(checkpoint.directory, sources.probe_of(checkpoint)),
    )

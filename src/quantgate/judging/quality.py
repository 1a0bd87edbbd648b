"""Quality: what did quantization cost, against the unquantized base on the same documents?

Takes what a check needs from the sources and hands it to the comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantgate.judging import compare, task_quality
from quantgate.judging.budget import quality_margin
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import actual_scheme
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.sources import Sources


def quality(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge perplexity, or the metric of a task, in the dtype that is served."""
    if checkpoint.task != GENERATE:
        return task_quality.quality(sources, checkpoint)
    base = _base(checkpoint)
    engine, unquantized = (sources.for_quality(c) for c in (checkpoint, base))
    probe = sources.probe_of(checkpoint, quality=True)
    return compare.quality(engine, unquantized, probe, margin=_margin(checkpoint))


def divergence_from_base(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge whole next-token distributions, in the dtype that is served."""
    base = _base(checkpoint)
    engine, unquantized = (sources.for_quality(c) for c in (checkpoint, base))
    probe = sources.probe_of(checkpoint, quality=True)
    found = sources.divergence(unquantized, base, engine, checkpoint, probe)
    return compare.divergence_from_base(
        engine, unquantized, found, probe, margin=_margin(checkpoint)
    )


def _base(checkpoint: Checkpoint) -> Checkpoint:
    base = checkpoint.base_checkpoint
    assert base is not None  # the check needs one
    return base


def _margin(checkpoint: Checkpoint) -> float:
    return quality_margin(checkpoint, actual_scheme(checkpoint.directory))

"""Quality: what did quantization cost, against the unquantized base on the same documents?

Collects what a check needs from its case and passes it to the comparison.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantgate.judging import compare, distributions, task_quality
from quantgate.judging.budget import quality_margin
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import actual_scheme
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.case import Case


def quality(case: Case) -> Verdict:
    """Judge perplexity, or the metric of a task, in the serving dtype."""
    if case.checkpoint.task != GENERATE:
        return task_quality.quality(case)
    assert case.base is not None  # the check needs one
    return compare.quality(
        case.for_quality,
        case.base.for_quality,
        case.quality_probe,
        margin=_margin(case.checkpoint),
    )


def divergence_from_base(case: Case) -> Verdict:
    """Judge whole next-token distributions, in the serving dtype."""
    assert case.base is not None  # the check needs one
    engine, base, probe = case.for_quality, case.base.for_quality, case.quality_probe
    found = case.divergence(base, engine, probe, base_of=case.base)
    return distributions.divergence_from_base(
        engine, base, found, probe, margin=_margin(case.checkpoint)
    )


def _margin(checkpoint: Checkpoint) -> float:
    return quality_margin(checkpoint, actual_scheme(checkpoint.directory))

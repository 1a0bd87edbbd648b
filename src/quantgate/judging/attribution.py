"""Attribution: which component is at fault when fidelity fails, with the evidence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantgate.measuring.measurement import largest_difference, mean_absolute_difference

if TYPE_CHECKING:
    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.measurement import Measurement

# Largest relative difference of the library's weights from ours: compressed-tensors rounds NVFP4's
# scale and then its value to bfloat16, by half a unit in the last place (2^-9) each, which together
# with the product of the two is a little above 2^-8.
LIBRARY_ROUNDING = 2.0**-7


@dataclass(frozen=True)
class Suspects:
    """Where to look for a fault; measured on demand, in the order of the verdicts."""

    engine: Measurement
    own: Measurement
    """The reference over weights from our dequantizer."""
    library: Callable[[], Measurement]
    """The reference over weights from compressed-tensors'."""
    disagreement: Callable[[], tuple[str, float]]
    """The linear on which the two dequantizers differ most, and their relative difference."""
    base: Callable[[], Verdict] | None
    """The same check on the unquantized base, if there is one."""
    modules: Callable[[], list[str]]
    """A line for each linear that replay finds to be off (`modules.modules_beyond`)."""
    whole: Callable[[], float | None] = lambda: 0.0
    """Largest difference of HF's own forward, not streamed, from the reference on a window; None
    if it does not fit into memory."""


def attribute(verdict: Verdict, suspects: Suspects) -> Verdict:
    """Return a failed verdict with its fault: CHECKPOINT, REFERENCE, ENVIRONMENT or ENGINE."""
    if verdict.outcome != "fail":
        return verdict
    fault, found = _fault(suspects)
    more = (line for line in found if line not in verdict.evidence)  # replay lists modules itself
    return dataclasses.replace(verdict, attribution=fault, evidence=(*verdict.evidence, *more))


def _fault(suspects: Suspects) -> tuple[str, list[str]]:
    own, engine = suspects.own, suspects.engine
    if own.nonfinite:
        return (
            f"CHECKPOINT: {own.nonfinite} log-probs of the reference are not finite either: its "
            "weights or scales are damaged",
            [],
        )
    linear, relative = suspects.disagreement()
    if not relative <= LIBRARY_ROUNDING:
        library = suspects.library()
        return (
            f"REFERENCE: the two dequantizers differ by {relative:.3g} on {linear}; the engine is "
            f"{mean_absolute_difference(engine, own):.3g} nat per token from the reference over "
            f"ours, {mean_absolute_difference(engine, library):.3g} from the one over "
            "compressed-tensors'",
            [],
        )
    moved = suspects.whole()
    if moved is not None and (said := _not_hfs_own(moved, engine, own)) is not None:
        return said, []
    if suspects.base is not None and (base := suspects.base()).outcome == "fail":
        return (
            "ENVIRONMENT: the unquantized base under the same settings is off too "
            f"({base.deviations[0]}), so it is the installation or [engine], not this checkpoint",
            [],
        )
    return (
        "ENGINE: both dequantizers agree on every weight"
        + (", and the unquantized base is served right" if suspects.base is not None else "")
        + (
            ""
            if moved is not None
            else "; the reference was not compared with HF's whole model, "
            "which does not fit into memory"
        ),
        suspects.modules(),
    )


def _not_hfs_own(moved: float, engine: Measurement, own: Measurement) -> str | None:
    """Report the reference as unlike the model if that explains half of the engine's error.

    Two forwards of one model differ by rounding, far less than the error of a failing engine.
    """
    off = largest_difference(engine, own)
    if not moved > off / 2:
        return None
    return (
        f"REFERENCE: on one window HF's own forward of the whole model is {moved:.3g} off the "
        f"streamed one, the engine {off:.3g} at most: this architecture is not streamed right"
    )

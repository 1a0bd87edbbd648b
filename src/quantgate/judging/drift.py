"""Drift: do the served results match the approved ones?

Collects what the check needs from its case and passes it to the comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from quantgate.formats import builds
from quantgate.judging import compare
from quantgate.judging.budget import drift_margin
from quantgate.judging.golden import as_stored, judge_golden
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion

    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.case import Case
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.probe import Probe


def drift(case: Case, snapshot: SnapshotAssertion, check: str) -> Verdict:
    """Judge an engine against the golden for `check`.

    float32 is judged token by token; other dtypes, and formats that quantize activations, by a
    mean.
    """
    return judge_golden(
        snapshot,
        case.checkpoint,
        case.probe,
        case.engine,
        check=check,
        compare=partial(against, case),
    )


def against(case: Case, engine: Measurement, golden: Measurement) -> Verdict:
    """Judge the part of an engine's measurement that a golden stores against the stored values."""
    probe = case.probe
    if case.by_value:
        return compare.drift_exact(
            engine,
            golden,
            probe,
            exact=lambda: as_stored(case.reference("float64")),
            reference=lambda: as_stored(case.exact),
        )
    if probe.task == GENERATE:
        return compare.drift_mean(
            engine,
            golden,
            probe,
            margin=drift_margin(case.checkpoint),
            moved=lambda: sum(_of_both(case, golden, compare.mean_shift)),
        )
    # Half of each side's allowance: equal machines are within ROUNDING_FACTOR of their rounding.
    allowed = sum(_of_both(case, golden, compare.within_rounding)) / 2
    return compare.drift_rounding(engine, golden, probe, allowed=allowed)


def _of_both(
    case: Case,
    golden: Measurement,
    figure: Callable[[Measurement, Measurement, Probe], float],
) -> list[float]:
    """Return a figure of rounding's effect on the reference, with this machine's rounding and the
    golden's.

    Rounding to the serving dtype or, in float32 with quantized inputs, from float64.
    """
    exact = as_stored(case.exact)
    there = golden.provenance.arithmetic.get("bfloat16", builds.narrowing())
    return [
        figure(as_stored(case.rounded(narrowing)), exact, case.probe)
        for narrowing in (builds.narrowing(), cast(builds.Narrowing, there))
    ]

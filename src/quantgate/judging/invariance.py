"""Invariance: the same measurement however it is served.

In chunks, in a different order, one by one, from the prefix cache; and, if a checkpoint's file asks
for it, on two ranks and on one, compiled and eager. Collects what a check needs from its case and
returns its verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.judging.budget import INVARIANCE_MAX, ROUNDING_FACTOR, fp32_max
from quantgate.judging.evidence import kernels_line, profile_of, worst_lines
from quantgate.judging.stats import rounding_allowance
from quantgate.judging.verdict import Deviation, Profile, Verdict, verdict_on

if TYPE_CHECKING:
    from quantgate.measuring.case import Case
    from quantgate.measuring.measurement import Measurement
    from quantgate.subject.checkpoint import Checkpoint

Values = NDArray[np.floating[Any]]
Derive = Callable[[Values], Values]


def served_otherwise(case: Case) -> Verdict:
    """Judge that a request's result does not depend on its batch, on chunking or on the cache."""
    probe, rows = case.mixed
    again = case.reruns(probe)
    said = again.how
    ways = [_Way(way, measured.values, rows) for way, measured in again.found.items()]
    if again.cached is not None:
        cached, values = again.cached
        ways.append(_Way("from the prefix cache", values, rows[cached]))
        said += " and from the prefix cache"
    right = f"{len(probe.windows)} windows give the same in any order and one by one, {said}"
    wrong = f"what is served depends on how it is served ({again.how})"
    return _verdict_on_ways(case, ways, right, wrong)


def tensor_parallel(case: Case) -> Verdict:
    """Judge that two ranks give the same as one, or one the same as the several that are served."""
    size = other_parallel_size(case.checkpoint)
    return _set_otherwise(case, f"tensor_parallel_size={size}", tensor_parallel_size=size)


def other_parallel_size(checkpoint: Checkpoint) -> int:
    """Return how many ranks `tensor_parallel` serves with: two, or one if the checkpoint has
    several."""
    return 2 if checkpoint.engine.tensor_parallel_size == 1 else 1


def compiled(case: Case) -> Verdict:
    """Judge that a compiled engine gives the same as an eager one."""
    eager = not case.checkpoint.engine.enforce_eager
    return _set_otherwise(case, f"enforce_eager={eager}", enforce_eager=eager)


def _set_otherwise(case: Case, setting: str, **settings: Any) -> Verdict:
    _ = case.engine  # first, while nothing else holds memory
    probe, rows = case.mixed
    other = case.set_otherwise(dataclasses.replace(case.checkpoint.engine, **settings), probe)
    right = f"{len(probe.windows)} windows give the same with {setting}"
    wrong = f"{setting} gives something else"
    return _verdict_on_ways(case, [_Way(setting, other.values, rows)], right, wrong)


@dataclass(frozen=True)
class _Way:
    """One way of serving, and its values for some rows of the checkpoint's probe."""

    name: str
    values: Values
    rows: NDArray[np.int64]


def _verdict_on_ways(case: Case, ways: Sequence[_Way], right: str, wrong: str) -> Verdict:
    engine = case.engine
    deviations = {
        way.name: same(
            way.name,
            (way.values, engine.values[way.rows]),
            case,
            derive=_at(way.rows),
            limit=INVARIANCE_MAX,
        )
        for way in ways
    }
    worst = max(ways, key=lambda way: _part_of_limit(deviations[way.name]))
    other = engine.values.copy()
    other[worst.rows] = worst.values
    found = profile_of(dataclasses.replace(engine, values=other), engine, case.probe)
    return by_limits(list(deviations.values()), right, engine, wrong=wrong, profile=found)


def _at(rows: NDArray[np.int64]) -> Derive:
    return lambda values: values[rows]


def same(
    what: str,
    two: tuple[Values, Values],
    case: Case,
    *,
    derive: Derive,
    limit: float | None = None,
    raw: bool = True,
) -> Deviation:
    """Return the deviation between `two` ways of serving the same rows, with its limit.

    In float32 every value counts. With quantized inputs, a sum in a different order flips codes,
    and flips cascade; and a 16-bit dtype rounds differently in a different order. Then the mean may
    be up to `ROUNDING_FACTOR` times the error that such rounding causes in the reference, `derive`d
    the same way, plus that mean's own error: each way of serving is within that. It is also shown
    as the noise floor, because it covers these rows and the checkpoint's own floor does not. `raw`
    says whether these are values of the measurement itself, whose largest move is known.
    """
    measured, expected = two
    delta = np.abs(measured.astype(np.float64) - expected)
    allowed = fp32_max(case.checkpoint.task) if limit is None else limit
    if case.by_value:
        return Deviation(
            f"{what}: max |Δ|", largest(delta), allowed, "", statistic="max_abs" if raw else None
        )
    rounded, exact = (derive(found.values) for found in (case.rounded(), case.exact))
    moved = np.abs(rounded.astype(np.float64) - exact)
    noise = float(np.mean(moved))
    moved = moved.reshape(len(moved), -1).mean(axis=1)
    allowed = max(allowed, rounding_allowance(moved, np.arange(len(moved)), ROUNDING_FACTOR))
    return Deviation(f"{what}: mean |Δ|", float(np.mean(delta)), allowed, "", floor=noise)


def by_limits(
    deviations: list[Deviation],
    right: str,
    engine: Measurement,
    *,
    wrong: str,
    evidence: Sequence[str] = (),
    profile: Profile | None = None,
) -> Verdict:
    """Return the verdict on several deviations, the one nearest to its limit first."""
    exceeded = [deviation for deviation in deviations if deviation.exceeded]
    profile = profile or Profile()
    shown = [*(f"found      {line}" for line in evidence), *worst_lines(profile)]
    # A table shows the one nearest to its limit, or furthest beyond.
    deviations = sorted(deviations, key=_part_of_limit, reverse=True)
    return verdict_on(
        engine,
        "fail" if exceeded else "pass",
        wrong if exceeded else right,
        deviations,
        evidence=(*shown, *kernels_line(engine)) if exceeded else (),
        profile=profile,
    )


def _part_of_limit(deviation: Deviation) -> float:
    if np.isnan(deviation.measured):
        return float("inf")
    if deviation.allowed == 0:
        return float("inf") if deviation.measured else 0.0
    return deviation.measured / deviation.allowed


def largest(values: Values) -> float:
    """Return the largest of values; NaN propagates, and exceeds every allowance."""
    return float(values.max())

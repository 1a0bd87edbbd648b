"""The noise floor: how far a checkpoint's numbers move when nothing that matters changes.

The same checkpoint is served again in a different order, in different batches and in chunks, and
the reference in the serving dtype is compared with itself in float32. Floors are measured and
stored with the goldens; without one, a checkpoint's floor is measured in the run that judges it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from quantgate.errors import BadInput
from quantgate.judging import task_quality
from quantgate.judging.golden import GoldenKey, golden_key, golden_path, stored_dtype
from quantgate.judging.verdict import Deviation, Statistic, Verdict
from quantgate.measuring import environment
from quantgate.measuring.measurement import Measurement, Provenance, rows_of
from quantgate.measuring.precision import FLOAT32
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.probe import Probe
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    from quantgate.measuring.case import Case

SCHEMA = 1


@dataclass(frozen=True)
class Rerun:
    """One way of repeating a measurement, and how far it moved each statistic."""

    name: str
    moved: Mapping[Statistic, float]


@dataclass(frozen=True)
class NoiseFloor:
    """How far a checkpoint's statistics move by themselves, in one dtype on one platform."""

    key: GoldenKey
    reruns: tuple[Rerun, ...]
    provenance: Provenance

    def of(self, statistic: Statistic) -> float | None:
        """Return the largest move of a statistic; None if no rerun has it."""
        moves = [rerun.moved[statistic] for rerun in self.reruns if statistic in rerun.moved]
        # max() would keep or lose a NaN, depending on its position.
        return float(np.max(moves)) if moves else None


# Judging -----------------------------------------------------------------------------------------


def beside(verdict: Verdict, floor: Callable[[], NoiseFloor]) -> Verdict:
    """Return a verdict with the floor beside each limit; computed only if noise affects any.

    If noise alone exceeds a limit, nothing can be shown: a pass becomes inconclusive, and so does a
    fail whose excess is not above the floor.
    """
    if not any(deviation.statistic for deviation in verdict.deviations):
        return verdict
    found = floor()
    deviations = tuple(
        dataclasses.replace(d, floor=found.of(d.statistic)) if d.statistic else d
        for d in verdict.deviations
    )
    verdict = dataclasses.replace(verdict, deviations=deviations)
    drowned = [d for d in deviations if _is_drowned(d)]
    shown = [d for d in deviations if d.exceeded and d not in drowned]
    if not drowned or shown or verdict.outcome == "not-run":
        return verdict
    first = drowned[0]
    detail = f"{verdict.detail}; noise alone moves it by {first.floor:.3g}, above its limit"
    return dataclasses.replace(verdict, outcome="inconclusive", detail=detail)


def _is_drowned(deviation: Deviation) -> bool:
    floor, allowed = deviation.floor, deviation.allowed
    if floor is None or floor <= allowed or np.isnan(deviation.measured):
        return False
    return not abs(deviation.measured) - allowed > floor


# Measuring ---------------------------------------------------------------------------------------


def measure(case: Case) -> NoiseFloor:
    """Serve a checkpoint's probe again in several ways."""
    engine, probe = case.engine, case.probe
    # The windows that `invariance` serves again too: the engine does it once for both.
    part, rows = case.mixed
    again, before = case.reruns(part), rows_of(engine, rows)
    moved = {
        f"{way}, {again.how}": _moved(case, measured, before, part)
        for way, measured in again.found.items()
    }
    # Values judged one by one have their own rule for rounding.
    if not case.by_value:
        exact, reference = case.exact, case.rounded()
        name = f"the reference in {reference.provenance.dtype}, not float32"
        moved[name] = _moved(case, reference, exact, probe)
    if case.dtype != FLOAT32 and _is_judged_by_a_metric(case.checkpoint):
        for way, metric in _metric_moved(case).items():
            moved[f"{way}, larger probe"] = {"metric": metric}
    reruns = tuple(Rerun(name, figures) for name, figures in moved.items())
    return NoiseFloor(golden_key(case.checkpoint, probe, engine), reruns, engine.provenance)


def served_again(case: Case) -> list[Probe]:
    """Return the probes that `measure` will serve again; none if a floor is stored.

    A stored floor may turn out to have a different key; then the floor is measured after all.
    """
    (platform,) = environment.available_devices().values()
    checkpoint = case.checkpoint
    tier = case.lab.tier_of(checkpoint)
    stored = checkpoint.golden and noise_path(checkpoint, case.dtype, platform).exists()
    if tier == "quick" or (stored and tier != "full"):
        return []
    part, _ = case.mixed
    if case.dtype == FLOAT32 or not _is_judged_by_a_metric(checkpoint):
        return [part]
    return [part, case.quality_probe]


def _moved(
    case: Case, one: Measurement, other: Measurement, probe: Probe
) -> dict[Statistic, float]:
    delta = one.values.astype(np.float64) - other.values
    found: dict[Statistic, float] = {
        "mean_abs": float(np.abs(delta).mean()),
        "max_abs": float(np.abs(delta).max()),
    }
    if probe.task == GENERATE:
        found["mean"] = float(abs(delta.mean()))
        if one.hidden is not None and other.hidden is not None:
            kld = case.divergence(other, one, probe).kld
            found["kld"] = float(kld.mean())
    return found


def _is_judged_by_a_metric(checkpoint: Checkpoint) -> bool:
    return checkpoint.has_own_metric and checkpoint.has_quality


def _metric_moved(case: Case) -> dict[str, float]:
    before = task_quality.metric_of(case, case.for_quality)
    again = case.reruns(case.quality_probe)
    return {
        f"{way}, {again.how}": abs(task_quality.metric_of(case, measured) - before)
        for way, measured in again.found.items()
    }


# Storing -----------------------------------------------------------------------------------------


def noise_path(checkpoint: Checkpoint, dtype: str, platform: str) -> Path:
    """Return a floor's path: `golden/<checkpoint id>/noise-<dtype>.<platform>.json`."""
    name = f"noise-{stored_dtype(dtype)}"
    return golden_path(checkpoint.root, checkpoint.id, name, platform)


def to_json(floor: NoiseFloor) -> str:
    """Serialize a floor: plain names and numbers."""
    content = {
        "schema": SCHEMA,
        "key": asdict(floor.key),
        "reruns": {rerun.name: dict(rerun.moved) for rerun in floor.reruns},
        "provenance": asdict(floor.provenance),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n"


def from_json(text: str, path: Path | str) -> NoiseFloor:
    """Read a floor; raise `BadInput` if the file is damaged."""
    try:
        content: dict[str, Any] = json.loads(text)
        if content["schema"] != SCHEMA:
            raise BadInput(
                f"{path}: schema {content['schema']}, but this quantgate reads {SCHEMA}."
            )
        moved = msgspec.convert(content["reruns"], dict[str, dict[Statistic, float]])
        return NoiseFloor(
            msgspec.convert(content["key"], GoldenKey),
            tuple(Rerun(name, figures) for name, figures in moved.items()),
            msgspec.convert(content["provenance"], Provenance),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{path}: damaged ({type(error).__name__}: {error}); restore it with git, or remove it "
            "and take a new one with `quantgate approve`."
        ) from None


def floor_of(case: Case) -> NoiseFloor:
    """Return the floor stored with a checkpoint's goldens; measure one if none matches its key.

    The full tier measures it anew.
    """
    engine, checkpoint = case.engine, case.checkpoint
    path = noise_path(checkpoint, case.dtype, engine.provenance.platform)
    if checkpoint.golden and path.exists() and case.lab.tier_of(checkpoint) != "full":
        floor = from_json(path.read_text(encoding="utf-8"), path)
        if floor.key == golden_key(checkpoint, case.probe, engine):
            return floor
    return measured_once(case)


def measured_once(case: Case) -> NoiseFloor:
    """Return a floor, measured at the first call in a run."""
    return case.once("noise floor", lambda: measure(case))

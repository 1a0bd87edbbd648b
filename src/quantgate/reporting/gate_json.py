"""`gate.json`: the run, for release scripts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.judging.results import CheckResult, overall, probes_of
from quantgate.judging.verdict import Verdict, worst

if TYPE_CHECKING:
    from quantgate.measuring.engine import EngineLife
    from quantgate.reporting.run import Run
    from quantgate.subject.tier import RunTier

SCHEMA = 1


def gate_json(run: Run) -> str:
    """Return the report; `gate.schema.json` is its schema."""
    results = list(run.results)
    ids = list(dict.fromkeys(result.checkpoint for result in results))
    content = {
        "schema": SCHEMA,
        "verdict": overall(results),
        "started": run.started,
        "duration_s": round(run.duration_s, 3),
        "shard": asdict(run.shard) if run.shard else None,
        "environment": dict(run.environment),
        "engines": sorted(map(_engine, run.engines), key=itemgetter("checkpoint", "dtype")),
        "checkpoints": [
            _checkpoint(
                [result for result in results if result.checkpoint == name], run.tiers.get(name)
            )
            for name in ids
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _engine(life: EngineLife) -> dict[str, Any]:
    return {
        "checkpoint": Path(life.directory).name,
        "dtype": life.dtype,
        "start_s": round(life.start_s, 3),
        "served_s": round(life.served_s, 3),
    }


def _checkpoint(results: list[CheckResult], tier: RunTier | None) -> dict[str, Any]:
    outcome = worst([result.verdict.counted for result in results])
    return {
        "id": results[0].checkpoint,
        "scheme": results[0].scheme,
        "task": results[0].task,
        "base": results[0].base,
        "verdict": outcome,
        "tier": tier.asked if tier else None,
        "required_tier": tier.required if tier else None,
        "released": tier.suffices and outcome == "pass" if tier else None,
        "probes": [asdict(probe) for probe in probes_of(results)],
        "emulated": sorted({name for result in results for name in result.verdict.emulated}),
        "checks": [
            {"name": result.check, **check_of_verdict(result.verdict)} for result in results
        ],
    }


def check_of_verdict(verdict: Verdict) -> dict[str, Any]:
    """Return a check's entry without its name."""
    headline = verdict.headline
    return {
        "verdict": verdict.outcome,
        "measured": _number(headline.measured) if headline else None,
        "allowed": headline.allowed if headline else None,
        "unit": headline.unit if headline else None,
        "noise_floor": _number(headline.floor) if headline and headline.floor is not None else None,
        "n": verdict.n,
        "mde": verdict.mde,
        "unpaired_mde": verdict.unpaired_mde,
        "p_value": verdict.p_value,
        "detail": verdict.detail,
        "figures": {name: _number(value) for name, value in verdict.figures.items()},
        "kernels": dict(verdict.kernels),
        "emulated": list(verdict.emulated),
        "repaired": list(verdict.repaired),
        "deviations": [
            {
                "what": d.what,
                "measured": _number(d.measured),
                "allowed": d.allowed,
                "unit": d.unit,
                "two_sided": d.two_sided,
                "noise_floor": None if d.floor is None else _number(d.floor),
            }
            for d in verdict.deviations
        ],
        "findings": [asdict(finding) for finding in verdict.findings],
        "since_golden": verdict.since_golden or None,
        "next_step": verdict.next_step or None,
        "attribution": verdict.attribution or None,
        "known_failure": verdict.known_failure or None,
    }


def _number(value: float) -> float | str:
    """Return NaN and infinity as strings, because JSON lacks them and null means missing."""
    return value if math.isfinite(value) else str(value)

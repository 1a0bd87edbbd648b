"""`index.html`: a one-page summary for the release decision, without network or scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantgate.judging.results import CheckResult, overall
from quantgate.judging.verdict import KLD_DECADES, Profile, worst
from quantgate.reporting.run import probes_line, tiers_line

if TYPE_CHECKING:
    from quantgate.reporting.run import Run

# The size of a chart, in SVG units.
WIDTH, HEIGHT = 320, 72
# A logarithmic chart spans four decades, and nothing below float32's rounding error.
SMALLEST = 1e-9


def index_html(run: Run) -> str:
    """Return the page. The template escapes all strings, including those from a checkpoint."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("quantgate.reporting", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    template = environment.get_template("index.html.jinja")
    results = list(run.results)
    return template.render(
        run=run,
        verdict=overall(results),
        tiers=tiers_line(run.tiers) if run.tiers else "",
        scored=probes_line(results),
        groups=[_group(results, task, run) for task in dict.fromkeys(r.task for r in results)],
        checkpoints=[
            _checkpoint([r for r in results if r.checkpoint == name], run)
            for name in dict.fromkeys(r.checkpoint for r in results)
        ],
        left_out=_counted(run.left_out),
    )


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table; None gives ""."""
    return "" if value is None else f"{value:.{digits}g}"


def _group(results: Sequence[CheckResult], task: str, run: Run) -> dict[str, Any]:
    """Return the matrix of one task's checkpoints and checks."""
    own = [result for result in results if result.task == task]
    checks = sorted(dict.fromkeys(result.check for result in own), key=run.place_of)
    rows = []
    for name in dict.fromkeys(result.checkpoint for result in own):
        found = {result.check: result for result in own if result.checkpoint == name}
        rows.append(
            {
                "id": name,
                "scheme": next(iter(found.values())).scheme,
                "verdict": worst([result.verdict.counted for result in found.values()]),
                "cells": [found.get(check) for check in checks],
            }
        )
    return {"task": task, "checks": checks, "rows": rows}


def _checkpoint(results: list[CheckResult], run: Run) -> dict[str, Any]:
    kernels: dict[str, str] = {}
    for result in results:
        kernels |= result.verdict.kernels
    changed = [r.verdict.since_golden for r in results if r.verdict.since_golden]
    return {
        "id": results[0].checkpoint,
        "scheme": results[0].scheme,
        "task": results[0].task,
        "verdict": worst([result.verdict.counted for result in results]),
        "results": results,
        "kernels": kernels,
        "emulated": {name for result in results for name in result.verdict.emulated},
        "since_golden": list(dict.fromkeys(changed)),
        "charts": {result.check: _charts(result) for result in results},
        "history": _trend(run.histories.get(results[0].checkpoint, ())),
    }


def _charts(result: CheckResult) -> list[dict[str, Any]]:
    profile = result.verdict.profile
    charts = []
    if len(profile.by_position) > 1 and any(largest for _, _, largest in profile.by_position):
        charts.append(_by_position(profile))
    if sum(profile.kld):
        charts.append(_kld(profile))
    return charts


def _by_position(profile: Profile) -> dict[str, Any]:
    """Return bars of the mean and largest |Δ| by position, logarithmic."""
    sizes = [size for _, _, size in profile.by_position if math.isfinite(size)]
    top = max([*sizes, SMALLEST * 10])
    bottom = max(SMALLEST, top * 1e-4)

    def height(value: float) -> float:
        if not math.isfinite(value):
            return HEIGHT
        share = math.log(max(value, bottom) / bottom) / math.log(top / bottom)
        return round(HEIGHT * share, 1)

    bars = [
        (place, height(size), f"{start}: {mean:.2g}, {size:.2g}")
        for place, (start, mean, size) in enumerate(profile.by_position)
        if size
    ]
    solid = [(place, height(mean)) for place, (_, mean, _) in enumerate(profile.by_position)]
    last = profile.by_position[-1][0]
    return _chart(
        f"|Δ| by position to {last}: mean (solid), largest (pale, to {top:.2g}); log",
        len(profile.by_position),
        bars,
        solid,
    )


def _kld(profile: Profile) -> dict[str, Any]:
    """Return bars of how many tokens have a KL divergence in each decade."""
    most = max(profile.kld)
    first, last = KLD_DECADES
    bars = [
        (place, HEIGHT * count / most, f"1e{first + place} to 1e{first + place + 1} nat: {count}")
        for place, count in enumerate(profile.kld)
        if count
    ]
    return _chart(f"tokens by KL divergence, 1e{first} to 1e{last + 1} nat", len(profile.kld), bars)


def _chart(
    title: str,
    places: int,
    bars: Sequence[tuple[int, float, str]],
    solid: Sequence[tuple[int, float]] = (),
) -> dict[str, Any]:
    """Return bars with their tooltips, and solid bars in front of them, if any.

    Bars are drawn as strokes, the shortest SVG for them, because a page has thousands.
    """
    step = WIDTH / places

    def stroke(place: int, height: float) -> str:
        return f"M{(place + 0.5) * step:.0f} {HEIGHT}v-{height:.1f}"

    return {
        "title": title,
        "width": round(step * 0.8),
        "bars": [(stroke(place, height), said) for place, height, said in bars],
        "solid": "".join(stroke(place, height) for place, height in solid if height),
    }


def _trend(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a golden's history: its first figure as a line, and its rows."""
    known = ("date", "reason", "versions", "before", "accepted_failing")
    rows = [
        {
            "date": entry.get("date", ""),
            "figures": {k: v for k, v in entry.items() if k not in known},
            "reason": entry.get("reason", ""),
            "accepted_failing": entry.get("accepted_failing", ""),
            "versions": ", ".join(f"{k} {v}" for k, v in entry.get("versions", {}).items()),
        }
        for entry in history
    ]
    values = [next(iter(row["figures"].values())) for row in rows if row["figures"]]
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    span = (high - low) or 1.0
    step = WIDTH / max(1, len(values) - 1)
    points = " ".join(
        f"{i * step:.1f},{HEIGHT - 8 - (HEIGHT - 16) * (value - low) / span:.1f}"
        for i, value in enumerate(values)
    )
    return {"rows": rows, "points": points if len(values) > 1 else "", "low": low, "high": high}


def _counted(left_out: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """Return what was skipped, grouped by reason."""
    found: dict[str, list[str]] = {}
    for subject, reason in left_out:
        found.setdefault(reason, []).append(subject)
    return found

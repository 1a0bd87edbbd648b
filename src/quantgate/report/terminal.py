"""The table at the end of a gate run."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantgate.report.results import CheckResult, overall
from quantgate.verdict import Outcome, Verdict

STYLE: dict[Outcome, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "not-run": "bold yellow",
}


def table(results: list[CheckResult], *, width: int, color: bool) -> str:
    """Return the results, one row a check, and the verdict on all of them."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("checkpoint", "scheme", "check", "verdict"):
        rows.add_column(heading, no_wrap=True)
    for heading in ("measured, nat", "allowed", "tokens", "MDE"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("kernels", no_wrap=True)
    for result in results:
        rows.add_row(*_cells(result))
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, highlight=False)
    console.print(rows)
    for checkpoint, names in _emulated(results).items():
        console.print(
            Text(f"\nemulated in {checkpoint}: {names}; no evidence about a real kernel"), end=""
        )
    outcome = overall(results)
    console.print(Text.assemble("\n\nverdict: ", (outcome.upper(), STYLE[outcome])))
    return stream.getvalue()


def _emulated(results: list[CheckResult]) -> dict[str, str]:
    return {r.checkpoint: ", ".join(r.verdict.emulated) for r in results if r.verdict.emulated}


def _kernels(verdict: Verdict) -> str:
    """Say which kind served a check; nothing where nothing was measured."""
    if verdict.emulated:
        return "emulated"
    return "" if verdict.n is None else "native"


def _cells(result: CheckResult) -> list[Text]:
    verdict = result.verdict
    headline = verdict.deviations[0] if verdict.deviations else None
    figures = ["", ""]
    if headline:
        sign = "±" if headline.two_sided else ""
        figures = [f"{headline.measured:.3g}", f"{sign}{headline.allowed:.3g}"]
    cells: list[str | Text] = [
        result.checkpoint,
        result.scheme,
        result.check,
        Text(verdict.outcome.upper(), style=STYLE[verdict.outcome]),
        *figures,
        "" if verdict.n is None else f"{verdict.n:,}",
        "" if verdict.mde is None else f"{verdict.mde:.2g}",
        _kernels(verdict),
    ]
    # Text, not markup: ids and schemes come from files.
    return [cell if isinstance(cell, Text) else Text(cell) for cell in cells]

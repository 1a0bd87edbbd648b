"""The table at the end of a gate run."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantgate.errors import printable
from quantgate.formats.kernels import explained
from quantgate.judging.golden import UNCHANGED
from quantgate.judging.results import CheckResult, overall
from quantgate.judging.verdict import REPAIRED
from quantgate.reporting.run import probes_line, tiers_line

if TYPE_CHECKING:
    from quantgate.judging.verdict import Outcome, Verdict
    from quantgate.measuring.engine import EngineLife
    from quantgate.reporting.run import Run

STYLE: dict[Outcome, str] = {
    "pass": "green",
    "fail": "bold red",
    "inconclusive": "yellow",
    "not-run": "bold yellow",
}
_ANY_WIDTH = 10_000


def summary(run: Run, *, width: int, color: bool) -> str:
    """Return the table of a run, and below it what was left out and what else is to be said."""
    results = list(run.results)
    found = table(results, width=width, color=color) if results else ""
    return found + "".join(f"{line}\n" for line in _below(run))


def _below(run: Run) -> Iterator[str]:
    if run.shard is not None:
        yield f"{run.shard}; `quantgate merge` makes one report of all shards"
    if run.tiers:
        yield tiers_line(run.tiers)
    if scored := probes_line(run.results):
        yield printable(scored)
    for reason, count in Counter(reason for _, reason in run.left_out).items():
        first = next(subject for subject, why in run.left_out if why == reason)
        others = f" and {count - 1} more" if count > 1 else ""
        yield f"skipped: {first}{others}: {reason}"
    for note in run.notes:
        yield printable(f"note: {note}")
    if run.engines:
        yield engines_line(run.engines)


def table(results: list[CheckResult], *, width: int, color: bool) -> str:
    """Return the results and the overall verdict.

    A single checkpoint gets a row per check. Several checkpoints get one row each, followed by the
    checks that did not pass. A terminal narrower than a table wraps its lines, so nothing is lost.
    """
    ids = list(dict.fromkeys(result.checkpoint for result in results))
    detailed = [r for r in results if len(ids) == 1 or r.verdict.outcome != "pass"]
    overview = [_overview(results)] if len(ids) > 1 else []
    tables = [*overview, *([_checks(detailed)] if detailed else [])]
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, highlight=False)
    console.width = max(width, *(_width(console, rows) for rows in tables))
    for index, rows in enumerate(tables):
        console.print(*([""] if index else []), rows, sep="\n")
    console.width = width
    for kernel, checkpoints in _emulated(results).items():
        line = f"\nemulated, no evidence about a real kernel: {kernel} in {', '.join(checkpoints)}"
        console.print(Text(line), end="")
    for head, checkpoints in _repaired(results).items():
        line = f"\nrepaired: {REPAIRED.format(head)}; in {', '.join(checkpoints)}"
        console.print(Text(line), end="")
    for said, checkpoints in _said_of_kernels(results).items():
        line = f"\nkernel deviates from its format: {said}, in {', '.join(checkpoints)}"
        console.print(Text(line), end="")
    for changed, checkpoints in _changed(results).items():
        console.print(Text(f"\nsince the golden: {changed} in {', '.join(checkpoints)}"), end="")
    outcome = overall(results)
    console.print(Text.assemble("\n\nverdict: ", (outcome.upper(), STYLE[outcome])))
    return stream.getvalue()


def _width(console: Console, rows: Table) -> int:
    return console.measure(rows, options=console.options.update(width=_ANY_WIDTH)).maximum


def _overview(results: list[CheckResult]) -> Table:
    rows = _table("checkpoint", "scheme", "verdict", "passed", "nearest to its limit")
    rows.add_column("cost in quality", justify="right", no_wrap=True)
    rows.add_column("kernels", no_wrap=True)
    for name in dict.fromkeys(result.checkpoint for result in results):
        own = [result for result in results if result.checkpoint == name]
        outcome = overall(own)
        passed = sum(result.verdict.outcome == "pass" for result in own)
        rows.add_row(
            Text(name),
            Text(own[0].scheme),
            Text(outcome.upper(), style=STYLE[outcome]),
            f"{passed} of {len(own)}",
            _nearest(own),
            _cost(own),
            " + ".join(sorted({kind for r in own if (kind := _kernels(r.verdict))})),
        )
    return rows


def _nearest(results: Iterable[CheckResult]) -> str:
    """Return which check's headline uses most of its allowance, and the two numbers."""
    judged = [
        (r.check, headline)
        for r in results
        if (headline := r.verdict.headline) is not None and not r.verdict.known_failure
    ]
    check, found = max(judged, key=lambda pair: pair[1].used, default=("", None))
    if found is None or not found.used:
        return ""
    sign = "±" if found.two_sided else ""
    return f"{check} {found.measured:.3g} of {sign}{found.allowed:.3g}"


def _cost(results: Iterable[CheckResult]) -> str:
    for result in results:
        if result.check == "quality" and (cost := result.verdict.headline) is not None:
            return f"{cost.measured:+.2g} {cost.unit}".rstrip()
    return ""


def _outcome(verdict: Verdict) -> str:
    return (
        f"{verdict.outcome.upper()} (known)" if verdict.known_failure else verdict.outcome.upper()
    )


def _checks(results: list[CheckResult]) -> Table:
    rows = _table("checkpoint", "scheme", "check", "verdict")
    for heading in ("measured", "allowed", "noise", "n", "MDE", "unpaired"):
        rows.add_column(heading, justify="right", no_wrap=True)
    rows.add_column("kernels", no_wrap=True)
    for result in results:
        rows.add_row(*_cells(result))
    return rows


def _table(*headings: str) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        rows.add_column(heading, no_wrap=True)
    return rows


def engines_line(engines: Sequence[EngineLife]) -> str:
    """Return one line with the number of engines started and where their time went."""
    starting = sum(life.start_s for life in engines)
    serving = sum(life.served_s for life in engines)
    longest = max(engines, key=lambda life: life.start_s + life.served_s)
    return (
        f"engines: {len(engines)} started, {starting:.1f} s starting and "
        f"{serving:.1f} s serving; the longest took {longest.start_s + longest.served_s:.1f} s: "
        f"{printable(Path(longest.directory).name)} in {longest.dtype}"
    )


def _emulated(results: list[CheckResult]) -> dict[str, list[str]]:
    """Return the checkpoints served by each emulated kernel."""
    return _checkpoints_by((kernel, r) for r in results for kernel in r.verdict.emulated)


def _repaired(results: list[CheckResult]) -> dict[str, list[str]]:
    """Return the checkpoints whose head a patch keeps whole, by the names of its layers."""
    return _checkpoints_by(
        (", ".join(r.verdict.repaired), r) for r in results if r.verdict.repaired
    )


def _said_of_kernels(results: list[CheckResult]) -> dict[str, list[str]]:
    """Return the checkpoints whose kernels deviate from their formats, by deviation."""
    return _checkpoints_by(
        (said, r) for r in results for said in explained(r.verdict.kernels.values())
    )


def _changed(results: list[CheckResult]) -> dict[str, list[str]]:
    """Return the checkpoints whose versions or kernels differ from their golden's, by change."""
    said = ((result.verdict.since_golden, result) for result in results)
    return _checkpoints_by((text, r) for text, r in said if text and UNCHANGED not in text)


def _checkpoints_by(said: Iterable[tuple[str, CheckResult]]) -> dict[str, list[str]]:
    found: dict[str, dict[str, None]] = {}
    for text, result in said:
        found.setdefault(text, {})[result.checkpoint] = None
    return {text: list(checkpoints) for text, checkpoints in sorted(found.items())}


def _kernels(verdict: Verdict) -> str:
    """Return the kind of kernels that served a check; "" if nothing was measured."""
    if verdict.emulated:
        return "emulated"
    return "" if verdict.n is None else "native"


def _cells(result: CheckResult) -> list[Text]:
    verdict = result.verdict
    headline = verdict.headline
    figures = ["", "", ""]
    if headline:
        sign = "±" if headline.two_sided else ""
        figures = [
            f"{headline.measured:.3g} {headline.unit}".rstrip(),
            f"{sign}{headline.allowed:.3g}",
            "" if headline.floor is None else f"{headline.floor:.2g}",
        ]
    cells: list[str | Text] = [
        result.checkpoint,
        result.scheme,
        result.check,
        Text(_outcome(verdict), style=STYLE[verdict.outcome]),
        *figures,
        "" if verdict.n is None else f"{verdict.n:,}",
        "" if verdict.mde is None else f"{verdict.mde:.2g}",
        "" if verdict.unpaired_mde is None else f"{verdict.unpaired_mde:.2g}",
        _kernels(verdict),
    ]
    # Text, not markup, because ids and schemes come from files.
    return [cell if isinstance(cell, Text) else Text(cell) for cell in cells]

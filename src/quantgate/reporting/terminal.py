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


# The width of the widest table. A narrower terminal wraps its lines, so nothing is lost.
TABLE_WIDTH = 176


def summary(run: Run, *, width: int, color: bool) -> str:
    """Return the table of a run, and below it what was left out and what else is to be said."""
    results = list(run.results)
    found = table(results, width=max(width, TABLE_WIDTH), color=color) if results else ""
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

    A single checkpoint gets a row per check. Several checkpoints get one row each, in one table per
    task, followed by the checks that did not pass.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color, highlight=False)
    ids = list(dict.fromkeys(result.checkpoint for result in results))
    if len(ids) > 1:
        for task in dict.fromkeys(result.task for result in results):
            console.print(_overview([result for result in results if result.task == task]))
    detailed = [r for r in results if len(ids) == 1 or r.verdict.outcome != "pass"]
    if detailed:
        console.print(*([""] if len(ids) > 1 else []), _checks(detailed), sep="\n")
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


def _overview(results: list[CheckResult]) -> Table:
    ids = list(dict.fromkeys(result.checkpoint for result in results))
    checks = list(dict.fromkeys(result.check for result in results))
    rows = _table("checkpoint", "scheme", "verdict")
    for check in checks:
        rows.add_column(check.replace("-", "\n", 1), justify="right", no_wrap=True)
    rows.add_column("kernels", no_wrap=True)
    for name in ids:
        own = {result.check: result for result in results if result.checkpoint == name}
        outcome = overall(list(own.values()))
        figures = [_figure(own[check]) if check in own else Text("") for check in checks]
        kernels = " + ".join(sorted({kind for r in own.values() if (kind := _kernels(r.verdict))}))
        scheme = Text(next(iter(own.values())).scheme)
        verdict = Text(outcome.upper(), style=STYLE[outcome])
        rows.add_row(Text(name), scheme, verdict, *figures, Text(kernels))
    return rows


def _figure(result: CheckResult) -> Text:
    verdict = result.verdict
    if verdict.outcome != "pass":
        return Text(_outcome(verdict), style=STYLE[verdict.outcome])
    return Text(f"{verdict.deviations[0].measured:.1e}" if verdict.deviations else "")


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
    headline = verdict.deviations[0] if verdict.deviations else None
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

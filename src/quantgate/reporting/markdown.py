"""`gate.md`: the run as a pull request comment or GitHub step summary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from quantgate.judging.results import CheckResult, overall
from quantgate.judging.verdict import SEVERITY, worst
from quantgate.reporting.run import probes_line, tiers_line

if TYPE_CHECKING:
    from quantgate.reporting.run import Run

SIGN = {"pass": "✅", "fail": "❌", "inconclusive": "❔", "not-run": "⏸️"}
# A comment holds 65,536 characters; the other reports have the full messages.
MOST_MESSAGES, LONGEST_MESSAGE = 20, 2000


def gate_md(run: Run) -> str:
    """Return the verdict, one row per checkpoint, and the messages of checks that did not pass."""
    results = list(run.results)
    outcome = overall(results)
    lines = [
        f"## {SIGN[outcome]} Quantgate: {outcome.upper()}",
        "",
        ", ".join(f"{name} {value}" for name, value in map(_row_of, run.environment.items())),
        "",
        *([escaped(str(run.shard)), ""] if run.shard else []),
        *([escaped(tiers_line(run.tiers)), ""] if run.tiers else []),
        *([escaped(scored), ""] if (scored := probes_line(results)) else []),
        "| checkpoint | scheme | verdict | checks | not passed |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result.checkpoint for result in results):
        own = [result for result in results if result.checkpoint == name]
        lines.append(_row(own))
    failed = sorted(
        (result for result in results if result.verdict.outcome != "pass"),
        key=lambda result: SEVERITY.index(result.verdict.counted),
    )
    for result in failed[:MOST_MESSAGES]:
        lines += ["", *_message(result)]
    if len(failed) > MOST_MESSAGES:
        lines += ["", f"… and {len(failed) - MOST_MESSAGES} more: see index.html."]
    return "\n".join(lines) + "\n"


def _row(results: list[CheckResult]) -> str:
    outcome = worst([result.verdict.counted for result in results])
    missed = [
        f"{r.check} {r.verdict.outcome.upper()}{' (known)' if r.verdict.known_failure else ''}"
        for r in results
        if r.verdict.outcome != "pass"
    ]
    emulated = " (emulated)" if any(r.verdict.emulated for r in results) else ""
    cells = [
        escaped(results[0].checkpoint),
        escaped(results[0].scheme) + emulated,
        f"{SIGN[outcome]} {outcome}",
        str(len(results)),
        ", ".join(map(escaped, missed)),
    ]
    return f"| {' | '.join(cells)} |"


def _message(result: CheckResult) -> list[str]:
    text = result.verdict.message(f"{result.checkpoint} {result.check}")
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[:LONGEST_MESSAGE]}…"
    # An indented block, which backticks in the text cannot end.
    block = [f"    {line}" for line in text.splitlines()]
    summary = escaped(f"{result.checkpoint} {result.check}: {result.verdict.outcome.upper()}")
    return [f"<details><summary>{summary}</summary>", "", *block, "", "</details>"]


def _row_of(item: tuple[str, str]) -> tuple[str, str]:
    return escaped(item[0]), escaped(item[1])


def escaped(text: str) -> str:
    """Escape text for Markdown and HTML."""
    found = "".join(c if c.isprintable() else "?" for c in text[:LONGEST_MESSAGE])
    for character in "\\`*_{}[]()#|~!@":
        found = found.replace(character, f"\\{character}")
    return found.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def markdown_table(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; cells are not escaped."""
    lines = [headings, ["---"] * len(headings), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

"""GitHub's annotations: an error at the line of a checkpoint's file for each check not passed.

GitHub Actions reads them from a job's output and shows them beside the files of a pull request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quantgate.judging.results import CheckResult

# Checks whose margin a table of the file overrides, and that table.
BUDGET_OF = {
    "quality": "quality",
    "divergence-from-base": "quality",
    "drift-float32": "drift",
    "drift-serving": "drift",
}


def workflow_commands(results: Iterable[CheckResult], root: Path, workspace: Path) -> Iterator[str]:
    """Yield a workflow command for each check that counts as other than a pass.

    Files are named relative to `workspace`, the checkout in which GitHub looks for them; a
    checkpoint without a file in the project `root` gets an annotation without a place.
    """
    for result in results:
        verdict = result.verdict
        if verdict.counted == "pass":
            continue
        properties = {"title": f"{result.checkpoint} {result.check}: {verdict.outcome.upper()}"}
        files = (root / "fixtures" / "checkpoints").rglob(f"{result.checkpoint}.toml")
        if (file := next(files, None)) is not None:
            line = line_of(result.check, file.read_text(encoding="utf-8"))
            place = {"file": _within(file, workspace), "line": str(line)}
            properties = place | properties
        said = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
        text = verdict.detail + (f"\nnext: {verdict.next_step}" if verdict.next_step else "")
        yield f"::error {said}::{_data(text)}"


def line_of(check: str, text: str) -> int:
    """Return the line of a checkpoint's file that has most to do with a check, from 1.

    The known failure of that check, or the table that overrides its margin; else the source.
    """
    patterns = [rf"check\s*=\s*[\"']{re.escape(check)}[\"']", r"source\s*="]
    if check in BUDGET_OF:
        patterns.insert(1, rf"\[budget\.{BUDGET_OF[check]}\]")
    lines = text.splitlines()
    for pattern in patterns:
        for number, line in enumerate(lines, start=1):
            if re.match(rf"\s*{pattern}", line):
                return number
    return 1


def _within(file: Path, workspace: Path) -> str:
    file, workspace = file.resolve(), workspace.resolve()
    return str(file.relative_to(workspace) if file.is_relative_to(workspace) else file)


def _data(text: str) -> str:
    """Escape a message as GitHub's own toolkit does; else its next line could be a command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")

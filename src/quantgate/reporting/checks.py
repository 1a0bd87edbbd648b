"""The list of all checks: what each asks, of which tasks, and what a checkpoint must have."""

from __future__ import annotations

import textwrap

from quantgate.judging.checks import ALL, CHECKS, Check

WIDTH = 100


def checks_list() -> str:
    """Return each check's names and question; a name is what `-k` and known failures take."""
    return "\n".join(_lines(check) for check in CHECKS) + "\n"


def _lines(check: Check) -> str:
    limits = []
    if check.tasks != ALL:
        limits.append(f"only {', '.join(check.tasks)}")
    if check.needs:
        limits.append(f"needs {', '.join(check.needs)}")
    asked = check.question + (f" ({'; '.join(limits)})" if limits else "")
    body = textwrap.fill(asked, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return f"{', '.join(check.names)}\n{body}"

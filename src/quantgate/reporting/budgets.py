"""The table of all limits and their sources."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from quantgate.judging.budget import LIMITS, SCHEME_BUDGETS
from quantgate.subject.checkpoint import Checkpoint

WIDTH = 118


def budgets_table(checkpoints: Iterable[Checkpoint]) -> str:
    """Return the defaults by scheme, the limits for all schemes, and the files' overrides."""
    overrides = [
        (checkpoint.id, check, f"{override.margin:g} nat/token", override.reason)
        for checkpoint in checkpoints
        for check, override in checkpoint.budget.items()
    ]
    stream = io.StringIO()
    console = Console(file=stream, width=WIDTH, no_color=True)
    console.print(
        _table(
            ("scheme begins with", "parameters", "quality, divergence-from-base", "source"),
            [
                (", ".join(b.schemes), _sizes(b.parameters), f"{b.margin:g} nat/token", b.source)
                for b in SCHEME_BUDGETS
            ],
        )
    )
    console.print()
    rows = [(limit.check, limit.what, limit.allowed, limit.source) for limit in LIMITS]
    console.print(_table(("check", "what", "allowed", "source"), rows))
    console.print()
    if overrides:
        console.print(_table(("checkpoint", "check", "allowed", "reason"), overrides))
    else:
        console.print("No checkpoint file overrides any.")
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _sizes(parameters: tuple[float, float] | None) -> str:
    if parameters is None:
        return "otherwise"
    return "{:g}M to {:g}M".format(*(size / 1e6 for size in parameters))


def _table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    found = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        found.add_column(heading, overflow="fold")
    for row in rows:
        found.add_row(*map(Text, row))  # not markup: ids and reasons come from files
    return found

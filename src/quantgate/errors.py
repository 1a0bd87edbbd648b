"""User errors: one sentence each, safe to print in a terminal."""

from __future__ import annotations

LONGEST_LINE = 2000


class BadInput(ValueError):
    """Unusable user input; the message gives the cause and the next step."""

    def __str__(self) -> str:
        return printable(super().__str__())  # it may quote a config


def printable(line: str) -> str:
    """Return a line with control characters replaced, cut at `LONGEST_LINE` characters.

    Names of modules, labels and tokens come from a checkpoint and are not trusted.
    """
    cut = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"
    return "".join(c if c.isprintable() else "?" for c in cut)

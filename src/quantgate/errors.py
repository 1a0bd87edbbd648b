"""What a user did, said in one sentence that a terminal can show."""

from __future__ import annotations

LONGEST_LINE = 2000


class BadInput(ValueError):
    """Something that the user gave is unusable; the message says what, and what to do."""

    def __str__(self) -> str:
        return printable(super().__str__())  # a config's words may be in it


def printable(line: str) -> str:
    """Return a line without what a terminal would obey, and cut where nobody reads on.

    Names of modules, labels and tokens come from a checkpoint.
    """
    cut = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}…"
    return "".join(c if c.isprintable() else "?" for c in cut)

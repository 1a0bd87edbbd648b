"""Turns the places that a rule yields into findings that are safe to print on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantgate.audit.finding import Finding, Rule
from quantgate.errors import printable

if TYPE_CHECKING:
    from quantgate.audit.inventory import Inventory

# Most characters shown of a checkpoint's name or value: longer than any real one.
LONGEST = 300


def findings_of(rule: Rule, inventory: Inventory) -> list[Finding]:
    """Return every place where a checkpoint breaks a rule."""
    return [
        Finding(rule.id, rule.severity, *(shown(text) for text in place))
        for place in rule.check(inventory)
    ]


def shown(text: str) -> str:
    """Return a checkpoint's text made safe for a terminal, truncated if it is long."""
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")

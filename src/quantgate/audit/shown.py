"""From what a rule says of a checkpoint to findings whose texts a terminal may show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantgate.audit.finding import Finding, Rule
from quantgate.errors import printable

if TYPE_CHECKING:
    from quantgate.audit.inventory import Inventory

# Of a name or value that a checkpoint gives: more than a real one has.
LONGEST = 300


def findings_of(rule: Rule, inventory: Inventory) -> list[Finding]:
    """Return every place where a checkpoint breaks a rule."""
    return [
        Finding(rule.id, rule.severity, *(shown(text) for text in place))
        for place in rule.check(inventory)
    ]


def shown(text: str) -> str:
    """Return a checkpoint's text as a terminal may show it, cut if it is long."""
    return printable(text if len(text) <= LONGEST else f"{text[:LONGEST]}…")

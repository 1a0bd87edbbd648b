"""Rules and findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from quantgate.audit.inventory import Inventory

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


class Place(NamedTuple):
    """Where a rule is broken: a tensor, a key or a file, with the value found."""

    name: str
    value: str
    expected: str
    file: str = ""


@dataclass(frozen=True)
class Rule:
    """A requirement on every checkpoint."""

    id: str
    severity: Severity
    why: str
    """One sentence: what happens if it is broken."""
    seen: str
    """Where it was seen in the wild."""
    check: Callable[[Inventory], Iterable[Place]]
    needs: Literal["files", "base", "weights"] = "files"
    """`base` rules also compare with the base's files, `weights` rules with its weights."""


@dataclass(frozen=True)
class Finding:
    """One place where a checkpoint breaks a rule; all texts are safe to print on a terminal."""

    rule: str
    severity: Severity
    name: str
    """A tensor, a module, a key or a file."""
    value: str
    expected: str
    file: str

    def __str__(self) -> str:
        return f"{self.name}: {self.value}; expected {self.expected}"

"""A finished gate run: what every report is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantgate.judging.results import CheckResult
from quantgate.measuring.engine import EngineLife


@dataclass(frozen=True)
class Run:
    """The results of a run, and what a reader must know besides."""

    results: Sequence[CheckResult]
    started: str
    """ISO 8601, UTC."""
    duration_s: float
    environment: Mapping[str, str]
    left_out: Sequence[tuple[str, str]] = ()
    """What the machine or a checkpoint cannot have, and why."""
    notes: Sequence[str] = ()
    engines: Sequence[EngineLife] = ()
    """Those that were started for it."""
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By checkpoint: the history of its golden in the served dtype, oldest first."""
    check_order: Sequence[str] = ()
    """The names of checks, as a person reads them."""

    def place_of(self, check: str) -> int:
        """Return where a check stands among a checkpoint's; a project's own come last."""
        known = check in self.check_order
        return self.check_order.index(check) if known else len(self.check_order)

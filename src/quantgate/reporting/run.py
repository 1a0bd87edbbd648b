"""A finished gate run: what every report is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    place_of: Callable[[str], int] = lambda _: 0
    """Where a check stands among a checkpoint's, as a person reads them; `checks.place_of`."""

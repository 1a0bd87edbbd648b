"""A finished gate run, the input of every report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantgate.judging.results import CheckResult
from quantgate.measuring.engine import EngineLife


@dataclass(frozen=True)
class Run:
    """The results of a run, and the context that a reader needs."""

    results: Sequence[CheckResult]
    started: str
    """ISO 8601, UTC."""
    duration_s: float
    environment: Mapping[str, str]
    left_out: Sequence[tuple[str, str]] = ()
    """The checks that this machine or a checkpoint cannot run, each with the reason."""
    notes: Sequence[str] = ()
    engines: Sequence[EngineLife] = ()
    """The engines that this run started."""
    histories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """By checkpoint: the history of its golden in the serving dtype, oldest first."""
    place_of: Callable[[str], int] = lambda _: 0
    """The position of a check in the order of display; see `checks.place_of`."""

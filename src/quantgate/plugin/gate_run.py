"""What one pytest session knows of its gate run, and of each check in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quantgate.judging.results import CheckResult
from quantgate.judging.verdict import not_run
from quantgate.measuring import engine
from quantgate.measuring.engine import EngineLife
from quantgate.plugin.scheduling import check_of
from quantgate.subject.checkpoint import Checkpoint

if TYPE_CHECKING:
    from quantgate.measuring.lab import Lab

PENDING = not_run("the run ended before its test")
DEFAULT_CACHE = Path(".gate-cache")


@dataclass
class GateRun:
    """What one pytest session knows of its gate run."""

    root: Path
    started: float = field(default_factory=time.time)
    engines_before: int = field(default_factory=lambda: len(engine.LIVES))
    checkpoints: list[Checkpoint] | None = None
    """The selected ones, once a suite was collected."""
    schemes: dict[str, str] = field(default_factory=dict)
    problem: str | None = None
    """Why nothing can be judged: raised once collection is over."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """Subject and reason."""
    results: dict[str, CheckResult] = field(default_factory=dict)
    """By node id: "not-run" for every selected check, until its test has judged it."""
    lab: Lab | None = None
    order: dict[str, int] = field(default_factory=dict)
    """Where each check stands in xdist's workers' collection: results come as they are ready."""
    crashed: dict[str, str] = field(default_factory=dict)
    """What xdist says of each check that a worker did not survive."""
    places: dict[str, int] = field(default_factory=dict)
    """Which part of the machine each of xdist's workers has: a crashed one's goes to its heir."""
    notes: list[str] = field(default_factory=list)
    """What xdist's workers want its reader to know."""
    engines: list[EngineLife] = field(default_factory=list)
    """Those that xdist's workers started."""

    @property
    def all_notes(self) -> list[str]:
        """What the run's reader must know, wherever it was measured."""
        return [*self.notes, *(self.lab.ledger.notes if self.lab else ())]

    @property
    def all_engines(self) -> list[EngineLife]:
        """The engines that were started, in whichever process."""
        return [*self.engines, *engine.LIVES[self.engines_before :]]


RUN = pytest.StashKey[GateRun]()


def params_of(item: pytest.Item) -> dict[str, Any]:
    """Return a check's parameters; {} for a test that judges no checkpoint."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params if isinstance(params.get("checkpoint"), Checkpoint) else {}


def is_check(item: pytest.Item) -> bool:
    """Whether a test is parametrized over checkpoints, of which there may be none for it."""
    return "checkpoint" in getattr(getattr(item, "callspec", None), "params", {})


def subject_of(item: pytest.Item) -> str:
    """Return what a check judges, for a person: "tiny-llama drift-float32 on cpu"."""
    params = params_of(item)
    return f"{params['checkpoint'].id} {check_of(item.nodeid)} on {params['device']}"


def cache_directory(config: pytest.Config) -> Path:
    """Return where a run keeps measurements of references and bases."""
    found: Path = config.getoption("gate_cache") or config.rootpath / DEFAULT_CACHE
    return found

"""The state of a gate run in one pytest session."""

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
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.tier import RunTier

if TYPE_CHECKING:
    from quantgate.measuring.lab import Lab

PENDING = not_run("the run ended before its test")
DEFAULT_CACHE = Path(".gate-cache")


@dataclass
class GateRun:
    """The state of a gate run in one pytest session."""

    root: Path
    started: float = field(default_factory=time.time)
    engines_before: int = field(default_factory=lambda: len(engine.LIVES))
    checkpoints: list[Checkpoint] | None = None
    """The selected checkpoints; None until a suite is collected."""
    shard: Shard | None = None
    """Which part of the selection this run judges; None if all of it."""
    schemes: dict[str, str] = field(default_factory=dict)
    tiers: dict[str, RunTier] = field(default_factory=dict)
    """By checkpoint: how much is asked of it."""
    problem: str | None = None
    """Why nothing can be judged; raised at the end of collection."""
    refused: str | None = None
    """Why a worker judged nothing; its controller prints it."""
    left_out: list[tuple[str, str]] = field(default_factory=list)
    """The skipped checks: subject and reason."""
    results: dict[str, CheckResult] = field(default_factory=dict)
    """By node id; every selected check is "not-run" until its test has judged it."""
    lab: Lab | None = None
    order: dict[str, int] = field(default_factory=dict)
    """Each check's position in the xdist workers' collection, because results arrive unordered."""
    crashed: dict[str, str] = field(default_factory=dict)
    """xdist's report for each check during which a worker crashed."""
    places: dict[str, int] = field(default_factory=dict)
    """Each xdist worker's share of the machine; a replacement inherits a crashed worker's."""
    notes: list[str] = field(default_factory=list)
    """Notes from the xdist workers."""
    engines: list[EngineLife] = field(default_factory=list)
    """The engines that the xdist workers started."""
    finished: Run | None = None
    """What was reported, at the end."""

    @property
    def has_nothing_to_judge(self) -> bool:
        """Whether this is a shard that no checkpoint is left for."""
        return self.shard is not None and not self.shard.own

    @property
    def all_notes(self) -> list[str]:
        """The run's notes, from all processes."""
        return [*self.notes, *(self.lab.ledger.notes if self.lab else ())]

    @property
    def all_engines(self) -> list[EngineLife]:
        """The engines that were started, in all processes."""
        return [*self.engines, *engine.LIVES[self.engines_before :]]


RUN = pytest.StashKey[GateRun]()


def params_of(item: pytest.Item) -> dict[str, Any]:
    """Return a check's parameters; {} for a test without a checkpoint."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params if isinstance(params.get("checkpoint"), Checkpoint) else {}


def is_check(item: pytest.Item) -> bool:
    """Whether a test is parametrized over checkpoints, even if none applies to it."""
    return "checkpoint" in getattr(getattr(item, "callspec", None), "params", {})


def subject_of(item: pytest.Item) -> str:
    """Return a readable name of a check, e.g. "tiny-llama drift-float32 on cpu"."""
    params = params_of(item)
    return f"{params['checkpoint'].id} {check_of(item.nodeid)} on {params['device']}"


def report_directory(config: pytest.Config) -> Path | None:
    """Return where the report goes, a directory of its own for each shard; None if nowhere."""
    directory: Path | None = config.getoption("gate_report")
    shard = config.stash[RUN].shard
    return directory / shard.folder if directory and shard else directory


def cache_directory(config: pytest.Config) -> Path:
    """Return the directory of the cached measurements of references and bases."""
    found: Path = config.getoption("gate_cache") or config.rootpath / DEFAULT_CACHE
    return found

"""xdist workers: their shares of the machine, and what they send to the controller."""

from __future__ import annotations

import itertools
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pytest

from quantgate.errors import printable
from quantgate.judging.results import CheckResult
from quantgate.measuring.engine import EngineLife
from quantgate.plugin import devices
from quantgate.plugin.scheduling import CheckpointScheduling, check_of
from quantgate.subject.tier import RunTier

if TYPE_CHECKING:
    from quantgate.plugin.gate_run import GateRun

WORKER = "quantgate"
PLACE = "quantgate_place"


def take_part(config: pytest.Config) -> None:
    """Restrict an xdist worker to its share of the machine; do nothing in other processes."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        _share_processors(worker["workercount"])
        worker[devices.SHARED_GPUS] = _own_gpus(worker[PLACE], worker["workercount"])


def send(config: Any, run: GateRun) -> None:
    """Send the controller what a worker knows besides its results."""
    config.workeroutput[WORKER] = {
        "refused": run.refused,
        "left_out": run.left_out,
        "tiers": {name: asdict(tier) for name, tier in run.tiers.items()},
        "notes": run.all_notes,
        "engines": [tuple(life) for life in run.all_engines],
    }


def _share_processors(workers: int) -> None:
    """Give each xdist worker a share of the CPUs; vLLM would bind all workers to the same ones."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _own_gpus(place: int, workers: int) -> int:
    """Give an xdist worker its GPUs; return how many there are if several workers share one."""
    found = devices.gpus()
    if owned := devices.share(place, workers, found):
        os.environ[devices.VISIBLE] = ",".join(owned)
    return len(found) if len(found) < workers else 0


@dataclass(frozen=True, eq=False)  # eq=False: pluggy hashes plugins by identity
class ResultCollector:
    """Collects the results from xdist workers; without xdist there is nothing to collect."""

    run: GateRun

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Store a result; pytest calls this in the controller for every phase of every test."""
        if (values := getattr(report, "quantgate", None)) is not None:
            self.run.results[report.nodeid] = CheckResult.from_dict(values)
        elif report.failed and report.nodeid in self.run.order and check_of(report.nodeid):
            # xdist's own report of a crashed worker.
            self.run.crashed[report.nodeid] = printable(report.longreprtext)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Assign a place; xdist calls this before it starts or replaces a worker."""
        taken = set(self.run.places.values())
        place = next(i for i in itertools.count() if i not in taken)
        self.run.places[node.gateway.id] = node.workerinput[PLACE] = place

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Return the scheduler that keeps each checkpoint on one worker."""
        return CheckpointScheduling(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Store the order of the checks; every worker collects the same ones in the same order."""
        self.run.order = {nodeid: place for place, nodeid in enumerate(ids)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take what an ended worker sent; every worker skips the same checks."""
        self.run.places.pop(node.gateway.id, None)
        said = getattr(node, "workeroutput", {}).get(WORKER, {})
        self.run.refused = self.run.refused or said.get("refused")
        if "left_out" in said:  # a crashed worker sends nothing
            self.run.left_out = [(subject, why) for subject, why in said["left_out"]]
        self.run.tiers |= {name: RunTier(**tier) for name, tier in said.get("tiers", {}).items()}
        self.run.notes += [note for note in said.get("notes", ()) if note not in self.run.notes]
        self.run.engines += [EngineLife(*life) for life in said.get("engines", ())]

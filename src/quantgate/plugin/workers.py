"""xdist's workers: what part of the machine each has, and what they send to the controller."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from quantgate.errors import BadInput, printable
from quantgate.judging.results import CheckResult
from quantgate.measuring.engine import EngineLife
from quantgate.plugin import devices
from quantgate.plugin.scheduling import CheckpointScheduling, check_of

if TYPE_CHECKING:
    from quantgate.plugin.gate_run import GateRun

WORKER = "quantgate"
PLACE = "quantgate_place"


def take_part(config: pytest.Config) -> None:
    """Leave an xdist worker its part of the machine; do nothing in any other process."""
    if (worker := getattr(config, "workerinput", None)) is not None:
        _share_processors(worker["workercount"])
        _own_gpus(worker[PLACE], worker["workercount"])


def send(config: Any, run: GateRun) -> None:
    """Leave the controller what a worker knows besides its results."""
    config.workeroutput[WORKER] = {
        "left_out": run.left_out,
        "notes": run.all_notes,
        "engines": [tuple(life) for life in run.all_engines],
    }


def _share_processors(workers: int) -> None:
    """Leave each xdist worker its part of the processors: vLLM would bind every one to the same."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _own_gpus(place: int, workers: int) -> None:
    """Leave each xdist worker GPUs of its own."""
    try:
        if owned := devices.share(place, workers, devices.gpus()):
            os.environ[devices.VISIBLE] = ",".join(owned)
    except BadInput as error:
        raise pytest.UsageError(str(error)) from None


@dataclass(frozen=True, eq=False)  # pluggy keeps plugins in sets: hashed by identity
class ResultCollector:
    """Takes the results that xdist workers send; without xdist they are there already."""

    run: GateRun

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest in the process that reports, for every phase of every test."""
        if (values := getattr(report, "quantgate", None)) is not None:
            self.run.results[report.nodeid] = CheckResult.from_dict(values)
        elif report.failed and report.nodeid in self.run.order and check_of(report.nodeid):
            # xdist's own report, of a worker that crashed.
            self.run.crashed[report.nodeid] = printable(report.longreprtext)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Called by xdist before it starts a worker, also one in the place of a crashed one."""
        taken = set(self.run.places.values())
        place = next(i for i in itertools.count() if i not in taken)
        self.run.places[node.gateway.id] = node.workerinput[PLACE] = place

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Called by xdist: keep a checkpoint on one worker, whatever loads the others."""
        return CheckpointScheduling(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Called by xdist when a worker has collected: all of them the same, in one order."""
        self.run.order = {nodeid: place for place, nodeid in enumerate(ids)}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Called by xdist when a worker has ended: all of them left out the same."""
        self.run.places.pop(node.gateway.id, None)
        said = getattr(node, "workeroutput", {}).get(WORKER, {})
        if "left_out" in said:  # a crashed worker says nothing
            self.run.left_out = [(subject, why) for subject, why in said["left_out"]]
        self.run.notes += [note for note in said.get("notes", ()) if note not in self.run.notes]
        self.run.engines += [EngineLife(*life) for life in said.get("engines", ())]

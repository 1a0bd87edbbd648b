"""`quantgate gate --ray`: each checkpoint judged by a task of Ray Core, all in one report."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.atomic import write_atomically
from quantgate.commands import merge
from quantgate.commands.gate import Asked
from quantgate.commands.ray_task import GateKilled, Judged, judge
from quantgate.errors import BadInput
from quantgate.judging.invariance import other_parallel_size
from quantgate.judging.results import overall
from quantgate.judging.verdict import not_run
from quantgate.measuring.engine_failure import first_line
from quantgate.reporting.merge import RESULTS, joined, read_results, require_one_probe, unjudged
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard
from quantgate.reporting.write import write_reports
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_all_checkpoint_files
from quantgate.subject.selected import Selection, selected

AUTO, LOCAL = "auto", "local"
ADDRESS = re.compile(r"(?P<host>[\w.-]+|\[[0-9a-fA-F:]+\]):(?P<port>[0-9]{1,5})")
# How often Ray runs a task again whose node, or whose gate, has been killed.
RETRIES = 2
LOG = "gate.log"
AGAIN = "run it again"
# Seconds to wait for the port of Ray's head; Ray itself would wait for two minutes.
PATIENCE = 10
# Settings that verdicts depend on, which a node does not have from the driver.
SETTINGS = "QUANTGATE_"


def run(asked: Asked, address: str) -> int:
    """Judge each checkpoint as a task of the Ray at `address`; return the exit status of `merge`.

    The report is written again whenever a task has ended. One without results is not-run in it.
    """
    ray = _ray()
    checkpoints = _selected(asked)
    _connect(ray, address)
    try:
        return _Launch(ray, asked, checkpoints).run()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {asked.report} says what was judged until then", file=sys.stderr)
        return 2
    finally:
        ray.shutdown()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BadInput(
            "--ray needs Ray, which is not installed: `pip install 'quantgate[ray]'`, here and on "
            "every node."
        ) from None
    return ray


def _selected(asked: Asked) -> list[Checkpoint]:
    """Return the checkpoints that the nodes will select with the same words, sorted by id."""
    asked.require_something()
    given = _pytests(asked.more)
    selection = Selection(asked.checkpoints, asked.base, given.quick, given.collection)
    root = asked.project.absolute()
    found = selected(selection, read_all_checkpoint_files(root), root)
    return sorted(found, key=lambda checkpoint: checkpoint.id)


def _pytests(words: Sequence[str]) -> argparse.Namespace:
    """Return those of pytest's options that decide what is judged, and on how many GPUs."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--quick", action="store_true")
    options.add_argument("--collection", default=".")
    options.add_argument("--tier")
    return options.parse_known_args(list(words))[0]


def _connect(ray: Any, address: str) -> None:
    """Connect to a running Ray, or start one on this machine alone for the address "local"."""
    if address not in (AUTO, LOCAL):
        _require_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (Exception, SystemExit) as error:  # Ray ends a driver that it does not let in
        why = f" ({line})" if isinstance(error, Exception) and (line := first_line(error)) else ""
        raise BadInput(
            f"--ray {address}: no connection to Ray{why}; start one with `ray start --head`, run "
            "this on one of its nodes, or give the HOST:PORT that `ray start` printed."
        ) from None


def _require_reachable(address: str) -> None:
    if (found := ADDRESS.fullmatch(address)) is None:
        raise BadInput(
            f"--ray {address}: not the HOST:PORT of Ray's head, nor '{AUTO}' or '{LOCAL}'; name "
            "checkpoints before --ray."
        )
    try:
        host = found["host"].strip("[]")
        socket.create_connection((host, int(found["port"])), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"--ray {address}: nothing answers there ({error}); `ray start --head` prints the "
            "address, and `ray status` tells whether Ray is up."
        ) from None


@dataclass(frozen=True)
class _Launch:
    """The tasks of one gate run on a Ray that this process is connected to."""

    ray: Any
    asked: Asked
    checkpoints: Sequence[Checkpoint]

    def run(self) -> int:
        """Judge everything, keep the report up to date, print the table; return the status."""
        ids = tuple(checkpoint.id for checkpoint in self.checkpoints)
        shards = [Shard(number, len(ids), ids) for number in range(1, len(ids) + 1)]
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        runs = {shard.number: self._unjudged(shard, "its task has not ended yet", started)
                for shard in shards}  # fmt: skip
        nodes = self._nodes()
        tasks = {}
        for shard, checkpoint in zip(shards, self.checkpoints, strict=True):
            (self._folder(shard) / RESULTS).unlink(missing_ok=True)
            if why := _why_nowhere(checkpoint, nodes):
                runs[shard.number] = self._unjudged(shard, why, started)
            else:
                tasks[self._start(shard, checkpoint, nodes)] = shard
        write_reports(joined(list(runs.values())), self.asked.report)
        while tasks:
            (done, *_), _ = self.ray.wait(list(tasks), num_returns=1)
            shard = tasks.pop(done)
            runs[shard.number] = found = self._result(done, shard, started, runs)
            write_reports(joined(list(runs.values())), self.asked.report)
            verdict = overall(list(found.results))
            print(f"{len(ids) - len(tasks)} of {len(ids)}: {shard.own[0]}: {verdict}", flush=True)
        merged = joined(list(runs.values()), _lost(nodes, self._nodes()))
        write_reports(merged, self.asked.report)
        return merge.tell(merged, self.asked.report)

    def _nodes(self) -> dict[str, dict[str, Any]]:
        """Return the nodes that are alive, by id."""
        return {node["NodeID"]: node for node in self.ray.nodes() if node["Alive"]}

    def _folder(self, shard: Shard) -> Path:
        return self.asked.report / shard.folder

    def _start(
        self, shard: Shard, checkpoint: Checkpoint, nodes: Mapping[str, Mapping[str, Any]]
    ) -> Any:
        """Start a task, and return the reference to what it will return."""
        gpus = _gpus_of(checkpoint, _pytests(self.asked.more).tier, _most(nodes, "GPU"))
        task = self.ray.remote(judge).options(
            name=f"gate {checkpoint.id}",
            num_gpus=gpus,
            # Without GPUs an engine takes all processors: one at a time on the smallest node.
            num_cpus=1 if gpus else _least_processors(nodes),
            max_retries=RETRIES,
            retry_exceptions=[GateKilled],
            scheduling_strategy="SPREAD",
        )
        settings = {k: v for k, v in os.environ.items() if k.startswith(SETTINGS)}
        return task.remote(self.asked.words(shard.name), str(Path.cwd()), settings)

    def _result(self, done: Any, shard: Shard, started: str, runs: Mapping[int, Run]) -> Run:
        """Return the run that a task has returned; what stands for it if there is none."""
        try:
            judged: Judged = self.ray.get(done)
        except self.ray.exceptions.RayError as error:
            why = f"its task was lost, with {RETRIES} retries ({_last_line(str(error))})"
            return self._unjudged(shard, why, started)
        log = self._folder(shard) / LOG
        write_atomically(log, judged.said)
        if judged.results is None:
            why = f"its gate on {judged.node} ended without results: {_last_line(judged.said)}"
            return self._unjudged(shard, why, started, f"read {log}, which is all that it printed")
        try:
            return self._read(judged.results, shard, judged.node, runs)
        except BadInput as error:
            return self._unjudged(shard, str(error), started)

    def _read(self, results: bytes, shard: Shard, node: str, runs: Mapping[int, Run]) -> Run:
        """Keep a task's results, and read them; `BadInput` if they do not go with the others'."""
        path = self._folder(shard) / RESULTS
        write_atomically(path, results)
        found = read_results(path)
        theirs = found.shard.checkpoints if found.shard else ()
        if theirs != shard.checkpoints:
            raise BadInput(
                f"{node} has selected {', '.join(theirs)}, and this machine "
                f"{', '.join(shard.checkpoints)}: they have different checkpoint files."
            )
        for other in runs.values():
            require_one_probe(node, found, "another node", other)
        return found

    def _unjudged(self, shard: Shard, why: str, started: str, step: str = AGAIN) -> Run:
        return unjudged(shard, not_run(why, step), self.asked.project.absolute(), started)


def _gpus_of(checkpoint: Checkpoint, tier: str | None, most: int) -> int:
    """Return how many GPUs a checkpoint's checks can use, of `most` on one node."""
    needed = checkpoint.engine.tensor_parallel_size
    if "tensor-parallel" in checkpoint.invariance or (tier or checkpoint.tier) == "full":
        needed = max(needed, other_parallel_size(checkpoint))
    return min(needed, most)


def _why_nowhere(checkpoint: Checkpoint, nodes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why no node can judge a checkpoint; None if one can."""
    needed, most = checkpoint.engine.tensor_parallel_size, _most(nodes, "GPU")
    if not most or needed <= most:
        return None
    return (
        f"its engine needs {needed} GPUs, and the largest node of this Ray has {most}; vLLM itself "
        "spreads an engine over nodes: judge it by itself, without --ray"
    )


def _most(nodes: Mapping[str, Mapping[str, Any]], kind: str) -> int:
    return int(max((node["Resources"].get(kind, 0) for node in nodes.values()), default=0))


def _least_processors(nodes: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the processors of the smallest node that takes tasks at all."""
    there = [int(node["Resources"].get("CPU", 0)) for node in nodes.values()]
    return min((count for count in there if count), default=1)


def _lost(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    gone = [str(node["NodeManagerAddress"]) for name, node in before.items() if name not in now]
    if not gone:
        return []
    return [f"nodes were lost ({', '.join(gone)}); what they judged at the time was judged again"]


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")

"""Measuring items in worker processes: one that fails, ends its process or hangs is not run."""

import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from gpu.journal import Journal
from gpu.parts import PARTS, Checkpoints
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure, LostDevice, first_line

POLL_SECONDS = 0.2
OVER = "the time given by --minutes was over"


class Limits(NamedTuple):
    """How long measuring may take."""

    seconds: float
    """Of one item; one that takes longer hangs."""
    deadline: float = math.inf
    """When all ends, by `time.time`."""


@dataclass
class _Worker:
    """One of the processes that share a part's items."""

    journal: Journal
    items: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    waiting: Sequence[str] = ()
    """What had not ended when its process started."""

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start a process for the items that have not ended."""
        self.journal.running.unlink(missing_ok=True)
        self.waiting = self.journal.waiting(self.items)
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, start_new_session=True
        )

    def failed(self, seconds: float) -> str | None:
        """Return how its process ended, or that it hangs; None while it measures."""
        assert self.process is not None
        if (started := self.journal.started()) and time.time() - started[1] > seconds:
            return f"it took longer than {seconds:g} s"
        if self.process.poll() is None:
            return None
        return f"its process ended with status {self.process.returncode} on the way"

    def end(self) -> None:
        """End its process and all that it started: an engine would keep its GPU."""
        if self.process is not None:
            _kill(self.process)
            self.process.wait()
            self.process = None

    def note(self, why: str) -> None:
        """Write why the item in hand was not run, or all of them where none began."""
        started = self.journal.started()
        if started is not None:
            self.journal.write(started[0], not_run=why)
        elif self.journal.waiting(self.items) == self.waiting:
            for item in self.waiting:
                self.journal.write(item, not_run=f"its process did not begin: {why}")


def supervise(
    command: Sequence[str],
    journal: Journal,
    items: Sequence[str],
    limits: Limits,
    environment: Mapping[str, str],
    processes: int = 1,
) -> None:
    """Run `command` until each item has ended; one that ends it, or hangs, is not run.

    Several `processes` share the items. Each is told its part as the last word of its command:
    "0/3" is every third item from the first (`share_of`).
    """
    shares = [f"{n}/{processes}" for n in range(processes)]
    workers = {
        share: _Worker(replace(journal, worker=n), share_of(items, share))
        for n, share in enumerate(shares)
    }
    try:
        while journal.waiting(items) and time.time() < limits.deadline:
            for share, one in workers.items():
                _step(one, [*command, share], limits.seconds, environment)
            time.sleep(POLL_SECONDS)
    finally:
        for one in workers.values():
            one.end()
    for item in journal.waiting(items):
        journal.write(item, not_run=OVER)


def share_of(items: Sequence[str], share: str) -> Sequence[str]:
    """Return the items of one of the processes that share them."""
    number, processes = map(int, share.split("/"))
    return items[number::processes]


def _step(
    one: _Worker, command: Sequence[str], seconds: float, environment: Mapping[str, str]
) -> None:
    """Start a worker that has no process, or end one that failed, and note what that took."""
    if not one.journal.waiting(one.items):
        return
    if one.process is None:
        one.start(command, environment)
    elif (why := one.failed(seconds)) is not None:
        one.end()
        one.note(why)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a worker and all it started: an engine would keep its GPU."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return


def work(part: str, journal: Journal, items: Sequence[str], known: Checkpoints, out: Path) -> None:
    """Measure a part's items one after another, in this process."""
    for item in journal.waiting(items):
        print(f"  {part}: {item}", file=sys.stderr, flush=True)
        journal.start(item)
        started = time.monotonic()
        try:
            figures = PARTS[part].measure(item, known, out)
        except LostDevice:  # to the item before: a new process has the device again
            journal.running.unlink()
            return
        except Exception as error:
            said = str(error)
            if not isinstance(error, BadInput | EngineFailure):
                traceback.print_exc()
                said = f"{type(error).__name__}: {first_line(error)}"
            journal.write(item, not_run=said)
            continue
        journal.write(item, seconds=time.monotonic() - started, figures=figures)

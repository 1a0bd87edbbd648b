"""Measuring items in worker processes: one that fails, ends its process or hangs is not run."""

import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
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


def supervise(
    command: Sequence[str],
    journal: Journal,
    items: Sequence[str],
    limits: Limits,
    environment: Mapping[str, str],
) -> None:
    """Run `command` until each item has ended; one that ends it, or hangs, is not run."""
    journal.running.unlink(missing_ok=True)
    while waiting := journal.waiting(items):
        if time.time() > limits.deadline:
            for item in waiting:
                journal.write(item, not_run=OVER)
            return
        with subprocess.Popen(
            command, env={**os.environ, **environment}, start_new_session=True
        ) as process:
            try:
                why = _watch(process, journal, limits)
            finally:
                _kill(process)
        started = journal.started()
        if started is not None:
            journal.write(started[0], not_run=why)
        elif journal.waiting(items) == waiting:
            for item in waiting:
                journal.write(item, not_run=f"its process did not begin: {why}")


def _watch(process: subprocess.Popen[bytes], journal: Journal, limits: Limits) -> str:
    """Return how a worker ended; one that hangs is left for its caller to kill."""
    seconds = limits.seconds
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if time.time() > limits.deadline:
            return OVER
        if (started := journal.started()) and time.time() - started[1] > seconds:
            return f"it took longer than {seconds:g} s"
    return f"its process ended with status {process.returncode} on the way"


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

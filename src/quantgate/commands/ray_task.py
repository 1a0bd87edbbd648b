"""What a task of `quantgate gate --ray` does on its node: the gate, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


class GateKilled(Exception):
    """A signal ended a task's gate, as when its node shuts down; Ray runs the task again."""


@dataclass(frozen=True)
class Judged:
    """What a task returns."""

    results: bytes | None
    """Its results.json; None if the gate ended without results."""
    said: str
    """What the gate printed."""
    node: str
    """Where it ran."""


def judge(words: Sequence[str], directory: str, settings: Mapping[str, str]) -> Judged:
    """Run `quantgate` with these words in a directory of this node; `settings` are variables.

    Raises `GateKilled` if a signal ended it.
    """
    node = socket.gethostname()
    if not Path(directory).is_dir():
        return Judged(None, f"{directory}: no such directory on {node}", node)
    with tempfile.TemporaryDirectory(prefix="quantgate-ray-") as report:
        ran = subprocess.run(
            [sys.executable, "-m", "quantgate", *words, "--gate-report", report],
            cwd=directory,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if ran.returncode < 0:
            raise GateKilled(f"signal {-ran.returncode} ended the gate on {node}")
        found = next(Path(report).glob("*/results.json"), None)
        return Judged(found.read_bytes() if found else None, ran.stdout, node)

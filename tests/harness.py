"""Run the gate as a user would, from a test."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantgate.engine import ENVIRONMENT

# What a test's engine runs in, in a process of its own. vLLM's default is most of the memory.
ENGINE_ENVIRONMENT = {**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class RunGate:
    """Runs pytest in `project` as a user would."""

    project: Path

    def __call__(
        self, *arguments: str | Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *map(str, arguments)],
            cwd=self.project,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    @property
    def report(self) -> dict[str, Any]:
        """The gate.json of the last run that was given `--gate-report report`."""
        found: dict[str, Any] = json.loads((self.project / "report" / "gate.json").read_text())
        return found

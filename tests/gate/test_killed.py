"""Whoever is killed, at any moment, damages nothing: goldens and cache are whole.

`KILLS=20 pytest tests/gate/test_killed.py` kills as often as before a release of the project.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from harness import RunGate, persons_environment
from safetensors import safe_open

from quantgate.judging.golden import from_json, to_json
from quantgate.measuring.cache import DiskCache
from quantgate.subject.probe import Probe

pytestmark = pytest.mark.slow(reason="whole gate runs, killed and then repeated")

KILLS = int(os.environ.get("KILLS", "1"))
LONGEST = 25.0
FEW = "float32 and (fidelity or drift)"


def kill_at_random(command: Sequence[str], project: Path, rng: random.Random) -> None:
    """Start a command, and kill it and all it started, without warning."""
    with subprocess.Popen(
        command, cwd=project, env=persons_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        time.sleep(rng.uniform(0, LONGEST))
        os.killpg(process.pid, signal.SIGKILL)


def cache_entries(project: Path) -> int:
    """Read every cache entry as the gate does: damage raises."""
    cache = DiskCache(project / ".gate-cache")
    entries = list(cache.directory.glob("*.safetensors")) if cache.directory.exists() else []
    for path in entries:
        with safe_open(path, framework="numpy") as stream:
            key = json.loads(stream.metadata()["key"])
        assert cache.path(key) == path
        assert cache.read(key) is not None
    return len(entries)


def test_a_killed_gate_run_damages_no_golden_and_no_cache_entry(run_gate: RunGate) -> None:
    rng = random.Random(0)
    goldens = {p: p.read_bytes() for p in (run_gate.project / "golden").rglob("*.json")}
    command = [sys.executable, "-m", "pytest", "suites", "-k", FEW]
    for _ in range(KILLS):
        kill_at_random(command, run_gate.project, rng)
        cache_entries(run_gate.project)
        assert goldens == {path: path.read_bytes() for path in goldens}
    result = run_gate("suites", "-k", FEW, "--gate-report", "report")
    assert result.returncode == 0, result.stdout
    assert run_gate.report["verdict"] == "pass"
    assert "damaged" not in result.stdout
    assert cache_entries(run_gate.project) == 1  # the float32 reference


def test_a_killed_regen_leaves_every_golden_whole(
    project: Path, root: Path, small_probe: Probe
) -> None:
    """Each is the one before or the one after, and the next run makes all of them the one after."""
    shutil.copytree(root / "tools", project / "tools")
    rng = random.Random(1)
    folder = project / "golden" / "tiny-llama-w4a16"
    moved = {}
    for path in folder.glob("drift-*.json"):
        golden = from_json(path.read_text(), small_probe, path)
        lower = replace(golden.measurement, values=golden.measurement.values - 0.25)
        path.write_text(to_json(replace(golden, measurement=lower), small_probe))
        moved[path] = len(golden.history)
    command = [sys.executable, "tools/regen_golden.py", "--checkpoint", "tiny-llama-w4a16",
               "--reason", "because"]  # fmt: skip
    for _ in range(KILLS):
        kill_at_random(command, project, rng)
        cache_entries(project)
        for path, approved in moved.items():
            history = from_json(path.read_text(), small_probe, path).history
            assert len(history) in (approved, approved + 1)
    done = subprocess.run(
        command, cwd=project, env=persons_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path, approved in moved.items():
        assert len(from_json(path.read_text(), small_probe, path).history) == approved + 1
    assert RunGate(project)("suites", "-k", "drift").returncode == 0

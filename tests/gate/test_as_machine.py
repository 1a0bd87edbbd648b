"""tools/as_machine.py: what a command and its children find, and the gate on a lesser processor."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from harness import RunGate

from quantgate.subject import processor

# A process that prints what its libraries take this machine for, and the bits of what they compute
# (the same integers everywhere: a generator of random numbers would depend on the machine too).
LOOK = """
import hashlib, json, math, os, subprocess, sys
import numpy as np
import torch

if len(sys.argv) > 1:
    sys.exit(subprocess.run([sys.executable, "-c", os.environ["LOOK"]]).returncode)

def bits(values):
    return hashlib.sha256(np.asarray(values).tobytes()).hexdigest()[:12]

x = ((np.arange(65 * 257) * 7919 % 18001 - 9000) / 3e3).reshape(65, 257)
a = torch.from_numpy(x)
from numpy._core._multiarray_umath import __cpu_features__
print(json.dumps({
    "threads": torch.get_num_threads(),
    "hidden": os.environ.get("AS_MACHINE_HIDES"),
    "aten": torch.backends.cpu.get_cpu_capability(),
    "torch.cpu": [torch.cpu._is_avx2_supported(), torch.cpu._is_avx512_supported()],
    "numpy": [__cpu_features__[name] for name in ("SSE42", "AVX2", "FMA3")],
    "silu": bits(torch.nn.functional.silu(a.float())),
    "mkl": bits(a @ a.T),
    "openblas": bits(x @ x.T),
    "numpy exp": bits(np.exp(x.astype(np.float32))),
    "libm exp": bits([math.exp(v) for v in x.ravel()]),
    "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA"),
    "compiled": os.environ.get("TORCHINDUCTOR_CACHE_DIR"),
}))
"""
# Where the bits that a library computes show that it obeys.
COMPUTED = ("silu", "mkl", "openblas", "numpy exp", "libm exp")


@pytest.fixture(scope="session")
def machines(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("as_machine")


def as_machine(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "tools" / "as_machine.py"), *arguments],
        env={**os.environ, "LOOK": LOOK, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def seen(root: Path, *arguments: str, child: bool = False) -> dict[str, Any]:
    more = ["child"] if child else []
    result = as_machine(root, *arguments, "--", sys.executable, "-c", LOOK, *more)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("child", [False, True], ids=["child", "grandchild"])
def test_every_library_obeys_in_a_process_and_in_its_child(root: Path, child: bool) -> None:
    found = seen(root, "sse41", "--threads", "1", child=child)
    assert found["threads"] == 1
    assert found["aten"] == "DEFAULT"
    assert found["torch.cpu"] == [False, False]
    assert found["numpy"] == [True, False, False]
    assert found["onednn"] == "SSE41"
    # Inductor's cache does not know the processor: AVX2 code from it does not compile as SSE's.
    assert "as-sse41" in found["compiled"]
    own = json.loads(
        subprocess.run([sys.executable, "-c", LOOK], capture_output=True, check=True).stdout
    )
    assert own["hidden"] is None
    assert [name for name in COMPUTED if found[name] == own[name]] == []


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_command_has_as_many_threads_as_it_is_given(root: Path, threads: int) -> None:
    """On the machine itself, where nothing else is set."""
    name = "avx512" if "avx512f" in processor.flags() else "avx2"
    assert seen(root, name, "--threads", str(threads))["threads"] == threads


def test_vllm_chooses_the_library_of_the_machine(machines: ModuleType) -> None:
    """From a processor that has everything, of which the patch hides a part."""
    have = ("avx", "avx2", "fma3", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile", "sse4_1")
    left = {
        name: {flag for flag in have if not flag.startswith(machine.hides)}
        for name, machine in machines.MACHINES.items()
    }
    assert left == {
        "sse41": {"sse4_1"},
        "avx2": {"sse4_1", "avx", "avx2", "fma3"},
        "avx512": {"sse4_1", "avx", "avx2", "fma3", "avx512_f"},
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("z80",), "'z80' is not a machine; choose from sse41, avx2, avx512."),
        (("sse41", "--threads", "0"), "--threads 0: at least 1 is needed."),
    ],
)
def test_what_cannot_be_asked_for_is_one_sentence(
    root: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = as_machine(root, *arguments, "--", sys.executable, "-c", "print('ran')")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {sentence}\n"


def test_a_command_that_is_not_there_is_one_sentence(root: Path) -> None:
    result = as_machine(root, "sse41", "--", "no-such-command")
    assert (result.returncode, result.stderr) == (
        2,
        "error: no-such-command: No such file or directory.\n",
    )


def test_a_few_checks_pass_on_a_lesser_processor(
    run_gate: RunGate, root: Path, machines: ModuleType
) -> None:
    """Goldens of another processor hold, and so do the references' roundings."""
    name = "fixtures/checkpoints/tiny-llama-w8a8.toml"
    shutil.copy(root / name, run_gate.project / name)
    few = "(w4a16 and ((fidelity and float32) or drift)) or (w8a8 and replay)"
    settings = machines.environment_of("sse41", 1, processor.flags())
    result = run_gate("suites", "-k", few, "--gate-report", "report", **settings)
    assert result.returncode == 0, result.stdout
    checks = [check for c in run_gate.report["checkpoints"] for check in c["checks"]]
    assert {check["verdict"] for check in checks} == {"pass"}
    assert len(checks) == 5

"""Start what needs Triton's interpreter: the fused kernel, and vLLM's V2 model runner on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow(reason="Triton's interpreter runs the kernels in Python"),
]


def test_the_fused_kernel_and_the_v2_runner_hold_in_tritons_interpreter(root: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/interpreted", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    assert "skipped" not in result.stdout

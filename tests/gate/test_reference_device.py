"""`--reference-device` in a gate run."""

import pytest
import torch
from harness import RunGate


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_usage_error(run_gate: RunGate) -> None:
    ran = run_gate("suites", "--reference-device", "cuda", "--co")
    assert ran.returncode == 4
    assert "ERROR: --reference-device cuda: torch sees no GPU here; leave" in ran.stderr
    assert "Traceback" not in ran.stderr
    unknown = run_gate("suites", "--reference-device", "tpu", "--co")
    assert "invalid choice: 'tpu'" in unknown.stderr

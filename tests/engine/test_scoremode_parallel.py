"""Tensor parallelism, in worker processes: scores, and captures of what every rank saw."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import ENGINE_ENVIRONMENT

from quantgate.measuring import reference
from quantgate.measuring.capture import Capture
from quantgate.measuring.replay import replay
from quantgate.subject.probe import Probe

# The gate itself judges an engine of two ranks, in `make gate`.
pytestmark = [pytest.mark.long, pytest.mark.slow(reason="two workers that each import vLLM")]

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import quantgate
from quantgate.subject.checkpoint import EngineSettings
from quantgate.measuring.session import measure
from quantgate.subject.probe import read_probe

model, probe, out, captured = map(Path, sys.argv[1:])
settings = EngineSettings(
    enforce_eager=True, max_model_len=1024, tensor_parallel_size=2, kernels="portable"
)
measured, capture = measure(
    model, read_probe(probe), settings=settings, dtype="float32", announce=print,
    capture_into=captured,
)
np.savez(out, logprob=measured.logprob, windows=capture.windows, captured=capture.values)
print(measured.provenance.kernels)
"""


def test_two_ranks_give_the_references_scores_and_modules(
    small_project: Path, quantized: Path, small_probe: Probe, tmp_path: Path
) -> None:
    """Each rank reduces its own vocabulary shard, and saw its own part of every linear."""
    environment = {
        **ENGINE_ENVIRONMENT,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers on a machine without NUMA nodes
    }
    captured, scores = tmp_path / "captured", tmp_path / "scores.npz"
    captured.mkdir()
    probe_file = small_project / "fixtures" / "probes" / "tiny.jsonl"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, quantized, probe_file, scores, captured],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'self_attn.qkv_proj': 'DequantizingLinearKernel'" in result.stdout
    found = np.load(scores)
    expected = reference.measure(quantized, small_probe, dtype="float32", announce=lambda _: None)
    difference = np.abs(found["logprob"].astype(np.float64) - expected.logprob)
    assert difference.max() <= 1e-5

    capture = Capture(captured, tuple(found["windows"].tolist()), found["captured"])
    assert len(list(captured.iterdir())) == 2 * len(capture.windows)
    replayed = replay(quantized, small_probe, capture, announce=lambda _: None)
    assert len(replayed.modules) == 4 * 7
    assert max(module.output for module in replayed.modules) <= 1e-5
    assert max(module.input for module in replayed.modules) <= 1e-5

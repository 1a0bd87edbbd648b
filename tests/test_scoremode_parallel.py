"""Tensor parallelism: each rank reduces its own vocabulary shard, in worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from quantgate import reference
from quantgate.engine import ENVIRONMENT
from quantgate.probe import read_probe

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
import quantgate
from quantgate.checkpoint import EngineSettings
from quantgate.engine import running_engine, score
from quantgate.probe import read_probe

model, probe, out = map(Path, sys.argv[1:])
settings = EngineSettings(enforce_eager=True, max_model_len=1024, tensor_parallel_size=2)
with running_engine(model, settings=settings, dtype="float32") as llm:
    logprob, top1 = score(llm, read_probe(probe))
np.savez(out, logprob=logprob, top1=top1)
"""


def test_two_ranks_give_the_references_scores(root: Path, tmp_path: Path) -> None:
    model, probe = root / "fixtures/tiny/llama", root / "fixtures/probes/tiny.jsonl"
    environment = {
        **os.environ,
        **ENVIRONMENT,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two workers on a machine without NUMA nodes
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, probe, tmp_path / "scores.npz"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = np.load(tmp_path / "scores.npz")
    expected = reference.measure(model, read_probe(probe), dtype="float32", announce=lambda _: None)
    difference = np.abs(found["logprob"].astype(np.float64) - expected.logprob)
    assert difference.max() <= 1e-5
    assert (found["top1"] == expected.top1).mean() > 0.9999

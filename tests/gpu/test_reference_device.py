"""The reference on a real GPU."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import quiet

from quantgate.measuring import reference
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import embedded_probe, probe_for


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="not run: it needs a GPU, and none is here"
)
@pytest.mark.parametrize("name", ["tiny-llama-w4a16", "tiny-llama-fp8-kv", "tiny-ner-bert-w4a16"])
def test_a_gpus_scores_are_the_cpus(root: Path, name: str) -> None:
    """In float64 to its rounding, in float32 to 1e-6 nat a token, on average."""
    directory = root / "build" / name
    task = read_checkpoint_files(root)[name].task
    probe, _ = probe_for(embedded_probe(root, task, quality=False), directory)
    for dtype, most in (("float64", 1e-9), ("float32", 1e-6)):
        here, there = (
            reference.measure(directory, probe, dtype=dtype, announce=quiet, device=device)
            for device in ("cpu", "cuda")
        )
        off = np.abs(here.values.astype(np.float64) - there.values)
        print(json.dumps({"dtype": dtype, "mean": off.mean(), "max": off.max()}))
        assert off.mean() < most

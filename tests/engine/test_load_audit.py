"""After vLLM has loaded a checkpoint: what it did not find, by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from audit_damages import FP8_KV, ROOT, W4A16
from raw_checkpoint import RawCheckpoint

from quantgate.measuring.engine import running_engine
from quantgate.measuring.loaded import LoadProblem, problems_of
from quantgate.subject.checkpoint import EngineSettings

NORM = "model.layers.1.input_layernorm"
SETTINGS = EngineSettings(
    enforce_eager=True, kv_cache_memory_bytes=1 << 27, kernels="portable", max_model_len=256
)


def loaded(directory: Path) -> tuple[LoadProblem, ...]:
    with running_engine(directory, settings=SETTINGS, dtype="float32") as llm:
        (parameters,) = llm.collective_rpc("quantgate_parameters")
    return problems_of(parameters, directory)


@pytest.mark.parametrize("name", [W4A16, FP8_KV, "tiny-qwen3-w8a8", "tiny-llama-nvfp4"])
def test_a_clean_checkpoint_is_loaded_whole(name: str) -> None:
    assert loaded(ROOT / "build" / name) == ()


def test_a_norm_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    """vLLM serves it as it was created."""
    checkpoint = RawCheckpoint(ROOT / "build" / W4A16, tmp_path / "damaged")
    checkpoint.drop(f"{NORM}.weight")
    checkpoint.write()
    (problem,) = loaded(checkpoint.directory)
    assert problem.name == NORM


def test_another_file_than_was_loaded_is_named(tmp_path: Path) -> None:
    """What the model holds against another file's norm and KV scale."""
    checkpoint = RawCheckpoint(ROOT / "build" / FP8_KV, tmp_path / "other")
    scale = "model.layers.1.self_attn.k_scale"
    for name in (f"{NORM}.weight", scale):
        checkpoint.tensors[name] = checkpoint.tensors[name].times(1.5)
    checkpoint.write()
    with running_engine(ROOT / "build" / FP8_KV, settings=SETTINGS, dtype="float32") as llm:
        (parameters,) = llm.collective_rpc("quantgate_parameters")
    found = problems_of(parameters, checkpoint.directory)
    assert {problem.name for problem in found} == {f"{NORM}.weight", scale}

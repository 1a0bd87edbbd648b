"""After vLLM has loaded a checkpoint: what is not what the file holds, by name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_damages import FP8_KV, NVFP4, ROOT, W4A16
from raw_checkpoint import RawCheckpoint
from small_models import save_random, small_models

from quantgate.measuring import loaded
from quantgate.measuring.engine import running_engine
from quantgate.measuring.loaded import LoadProblem, audits_of
from quantgate.measuring.pooling import pooling_arguments
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.files import read_config
from quantgate.subject.task import task_of

LAYER = "model.layers.1."
NORM = f"{LAYER}input_layernorm.weight"
QUERY = f"{LAYER}self_attn.q_proj"
SETTINGS = EngineSettings(
    enforce_eager=True, kv_cache_memory_bytes=1 << 27, kernels="portable", max_model_len=256
)
BUILT = sorted(path.parent.name for path in (ROOT / "build").glob("*/config.json"))
# vLLM 0.32 refuses act-order by groups.
SERVED = [name for name in BUILT if not name.endswith("actorder")]


def loaded_by(
    directory: Path, change: Callable[[Any], object] = lambda _: None, **settings: Any
) -> list[tuple[LoadProblem, ...]]:
    """Return what each rank's audit finds; `change` damages the model while it serves."""
    task = task_of(read_config(directory))
    with running_engine(
        directory,
        settings=dataclasses.replace(SETTINGS, **settings),
        dtype="bfloat16",
        audit_load=True,
        **pooling_arguments(directory, task),
    ) as llm:
        if not settings:
            llm.apply_model(change)
        audits = [audit for audit in audits_of(llm) if audit is not None]
    assert all(audit.compared > 10 and not audit.failed for audit in audits)
    return [audit.problems for audit in audits]


def model_of(directory: Path, name: str) -> Path:
    save_random(small_models()[name], directory)
    return directory


@pytest.mark.parametrize("name", SERVED)
def test_a_clean_checkpoint_is_loaded_whole(name: str) -> None:
    assert loaded_by(ROOT / "build" / name) == [()]


@pytest.mark.parametrize("name", sorted(small_models()))
def test_so_is_every_architecture(name: str, tmp_path: Path) -> None:
    """Fused and stacked, tied, with biases and experts."""
    assert loaded_by(model_of(tmp_path, name)) == [()]


@pytest.mark.parametrize(
    "name",
    [NORM, "model.norm.weight", f"{QUERY}.weight_packed", f"{LAYER}mlp.down_proj.weight_scale"],
)
def test_a_tensor_that_is_not_in_the_file_is_named(tmp_path: Path, name: str) -> None:
    """vLLM serves what memory held."""
    checkpoint = RawCheckpoint(ROOT / "build" / W4A16, tmp_path / "damaged")
    checkpoint.drop(name)
    checkpoint.write()
    ((problem, *others),) = loaded_by(checkpoint.directory)
    assert (problem.name, problem.in_file) == (name, False)
    # Memory may have held anything.
    assert {other.value for other in others} <= {"is not finite after loading"}


def altered(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Let vLLM's loader damage a model before its weights are repacked."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    load = DefaultModelLoader.load_weights

    def load_and_damage(loader: Any, model: Any, model_config: Any) -> Any:
        answer = load(loader, model, model_config)
        change(dict(model.named_parameters()))
        return answer

    monkeypatch.setattr(DefaultModelLoader, "load_weights", load_and_damage)


def swap_q_and_k(parameters: dict[str, torch.Tensor]) -> None:
    fused = parameters[f"{LAYER}self_attn.qkv_proj.weight_scale"].data
    fused[:128], fused[256:384] = fused[256:384].clone(), fused[:128].clone()


def exchange_gate_and_up(parameters: dict[str, torch.Tensor]) -> None:
    fused = parameters[f"{LAYER}mlp.gate_up_proj.weight_packed"].data
    fused.copy_(fused.roll(len(fused) // 2, dims=0))


def never_write(parameters: dict[str, torch.Tensor]) -> None:
    parameters[f"{LAYER}self_attn.qkv_proj.weight_scale"].data[256:384] = 0.0


def scale(parameters: dict[str, torch.Tensor]) -> None:
    parameters[f"{LAYER}self_attn.o_proj.weight_scale"].data[3] *= 1.02


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_q_and_k, {f"{QUERY}.weight_scale", f"{LAYER}self_attn.k_proj.weight_scale"}),
        (
            exchange_gate_and_up,
            {f"{LAYER}mlp.gate_proj.weight_packed", f"{LAYER}mlp.up_proj.weight_packed"},
        ),
        (never_write, {f"{LAYER}self_attn.k_proj.weight_scale"}),
        (scale, {f"{LAYER}self_attn.o_proj.weight_scale"}),
    ],
)
def test_a_shard_that_is_loaded_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object], named: set[str]
) -> None:
    altered(monkeypatch, change)
    (problems,) = loaded_by(ROOT / "build" / W4A16)
    assert {problem.name for problem in problems} == named
    assert all(problem.in_file for problem in problems)
    if change is exchange_gate_and_up:
        assert f"holds {LAYER}mlp.up_proj.weight_packed" in problems[0].value


def test_one_global_scale_of_a_fused_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(parameters: dict[str, torch.Tensor]) -> None:
        parameters[f"{LAYER}self_attn.qkv_proj.weight_global_scale"].data[2] = math.inf

    altered(monkeypatch, change)
    (problems,) = loaded_by(ROOT / "build" / NVFP4)
    assert f"{LAYER}self_attn.v_proj.weight_global_scale" in {problem.name for problem in problems}


def test_experts_that_are_loaded_wrong_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(parameters: dict[str, torch.Tensor]) -> None:
        (gate_up,) = (v for n, v in parameters.items() if n.startswith(LAYER) and "w13_weight" in n)
        (down,) = (v for n, v in parameters.items() if n.startswith(LAYER) and "w2_weight" in n)
        gate_up.data[2] = gate_up.data[2].roll(gate_up.shape[1] // 2, dims=0)
        down.data[4] = down.data[3]

    altered(monkeypatch, change)
    (problems,) = loaded_by(model_of(tmp_path, "qwen3-moe"))
    said = {problem.name: problem.value for problem in problems}
    experts = f"{LAYER}mlp.experts."
    assert set(said) == {
        f"{experts}{name}.weight" for name in ("2.gate_proj", "2.up_proj", "4.down_proj")
    }
    assert f"holds {experts}3.down_proj.weight" in said[f"{experts}4.down_proj.weight"]


def test_what_changes_while_it_serves_is_named() -> None:
    def change(model: Any) -> None:
        model.get_parameter("model.layers.1.mlp.down_proj.weight").data[0] *= 1.02
        model.get_parameter("model.norm.weight").data[5] = math.nan

    (problems,) = loaded_by(ROOT / "build" / W4A16, change)
    said = {(problem.name, problem.value.split()[1]) for problem in problems}
    assert said >= {
        ("model.layers.1.mlp.down_proj.weight", "changed"),
        ("model.norm.weight", "changed"),
        ("model.norm.weight", "not"),
    }


def test_kv_scales_that_are_not_in_use_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if vLLM had not loaded them: it serves at 1.0, and says nothing that is seen."""

    def change(parameters: dict[str, torch.Tensor]) -> None:
        for name, value in parameters.items():
            if name.endswith(".attn.k_scale"):
                value.data.fill_(1.0)

    altered(monkeypatch, change)
    (problems,) = loaded_by(ROOT / "build" / FP8_KV)
    assert {problem.name for problem in problems} == {
        f"model.layers.{layer}.self_attn.k_scale" for layer in range(4)
    }
    assert problems[0].value == "1 is in use"


def test_a_model_that_cannot_be_compared_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("w13_weight")

    monkeypatch.setattr(loaded, "compared", fail)
    with running_engine(
        ROOT / "build" / W4A16, settings=SETTINGS, dtype="float32", audit_load=True
    ) as llm:
        (audit,) = audits_of(llm)
    assert audit is not None
    assert audit.failed == "KeyError: 'w13_weight'"


def test_an_engine_that_is_not_asked_does_not_compare() -> None:
    with running_engine(ROOT / "build" / W4A16, settings=SETTINGS, dtype="float32") as llm:
        assert audits_of(llm) == (None,)


@pytest.mark.slow(reason="two workers that each import vLLM")
def test_both_ranks_hold_their_part() -> None:
    assert loaded_by(ROOT / "build" / W4A16, tensor_parallel_size=2) == [(), ()]

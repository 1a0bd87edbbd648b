"""The audit reads formats, and resolves targets, as the libraries do that it does not import."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quantgate.audit.decode import E4M3, E8M0
from quantgate.audit.dequantize import (
    Nearest,
    quantized_weight,
    rounding_to,
    to_float,
    whole_weight,
)
from quantgate.audit.inventory import read_inventory
from quantgate.audit.layout import layout_of
from quantgate.audit.quantization import FUSED, Group, Resolver, read_quantization

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "fixtures" / "tiny" / "llama"
QUANTIZED = sorted(path.name for path in (ROOT / "build").glob("tiny-*"))
# Those whose scales are powers of two or E4M3, so that nothing is rounded to bfloat16 on the way.
EXACT = ("tiny-llama-nvfp4", "tiny-llama-nvfp4a16", "tiny-llama-mxfp4a16", "tiny-llama-mxfp8")


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_are_dequantized_as_by_the_gate(name: str) -> None:
    """Bit for bit, by two definitions that share no code, in blocks of rows and whole."""
    from quantgate.formats.stored import StoredTensors
    from quantgate.formats.weights import dequantize_weight

    directory = ROOT / "build" / name
    inventory, stored = read_inventory(directory), StoredTensors(directory)
    config = inventory.config["quantization_config"]["config_groups"]
    for module in list(inventory.groups)[::5]:
        group, parts = inventory.groups[module], inventory.modules[module]
        layout = layout_of(group, parts)
        assert layout is not None
        weight = quantized_weight(parts, group, layout)
        expected = dequantize_weight(
            stored.of_module(module), config[group.name]["weights"]
        ).numpy()
        half = layout.rows // 2
        rows = np.concatenate([weight.read(0, half), weight.read(half, layout.rows)])
        assert np.array_equal(rows, expected)


@pytest.mark.parametrize("name", EXACT)
def test_rounding_to_nearest_is_compressed_tensors(name: str) -> None:
    """What the error of a weight is held against: the same codes and scales as the library's."""
    inventory, base = read_inventory(ROOT / "build" / name), read_inventory(BASE)
    for module in list(inventory.groups)[::9]:
        group, parts = inventory.groups[module], inventory.modules[module]
        layout = layout_of(group, parts)
        assert layout is not None
        own = quantized_weight(parts, group, layout).read(0, layout.rows)
        weight = whole_weight(base.tensors[f"{module}.weight"]).read(0, layout.rows)
        assert np.array_equal(Nearest(group, parts, layout.columns, 0.0)(weight), own)


def test_small_floats_are_those_of_torch() -> None:
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    for table, dtype in ((E4M3, torch.float8_e4m3fn), (E8M0, torch.float8_e8m0fnu)):
        assert np.array_equal(table, codes.view(dtype).float().numpy(), equal_nan=True)
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(20_000, generator=chance) * torch.logspace(-5, 3, 20_000)
    assert np.array_equal(
        to_float(values.numpy(), 3, -6, 448.0),
        values.clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy(),
    )
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        assert np.array_equal(rounding_to(name)(values.numpy()), values.to(dtype).float().numpy())


NAMES = [
    f"model.layers.{layer}.{module}"
    for layer in (0, 11)
    for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
] + ["lm_head", "model.visual.merger.0"]
PATTERNS: list[tuple[list[str], list[str]]] = [
    (["Linear"], ["lm_head"]),
    (["linear"], []),
    (["re:.*self_attn.*", "re:.*_proj$"], ["re:.*layers.11.*"]),
    (["re:.*_proj$", "model.layers.0.mlp.gate_proj"], ["re:visual"]),
    (["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], []),
    (["Linear", "re:.*mlp.*"], ["model.layers.0.self_attn.q_proj"]),
    (["Linear"], ["model.layers.0.self_attn.qkv_proj", "re:.*gate_up_proj"]),
]


def resolver_of(targets: list[str], ignore: list[str]) -> Resolver:
    groups = {target: {"targets": [target], "weights": None} for target in targets}
    return Resolver(read_quantization({"config_groups": groups, "ignore": ignore}))


@pytest.mark.parametrize(("targets", "ignore"), PATTERNS)
def test_targets_are_resolved_as_by_both_libraries(targets: list[str], ignore: list[str]) -> None:
    """compressed-tensors' `match_targets`; vLLM's `should_ignore_layer`, `find_matched_target`."""
    import torch
    from compressed_tensors.utils.match import is_match, match_targets
    from vllm.model_executor.layers.quantization.compressed_tensors import utils

    resolver, linear = resolver_of(targets, ignore), torch.nn.Linear(1, 1)
    for name in NAMES:
        matched = match_targets(name, linear, targets)
        ignored = is_match(name, linear, ignore)
        expected = None if ignored or not matched else matched[0]
        assert named(resolver.by_compressed_tensors(name)) == expected
    mapping = {fused: list(shards) for fused, shards in FUSED.items()}
    kinds = {"qkv_proj": "QKVParallelLinear", "gate_up_proj": "MergedColumnParallelLinear"}
    for fused in ("model.layers.0.self_attn.qkv_proj", "model.layers.11.mlp.gate_up_proj", *NAMES):
        own = fused.rpartition(".")[2]
        module: Any = type(kinds.get(own, "ReplicatedLinear"), (SimpleNamespace,), {})()
        try:
            ignored = utils.should_ignore_layer(fused, ignore, mapping)
            theirs = None if ignored else utils.find_matched_target(fused, module, targets, mapping)
        except ValueError:
            theirs = "refused"
        assert named(resolver.by_vllm(fused, (fused,))) == theirs


def named(group: Group | str | None) -> str | None:
    """Return a group's name, which is its target here."""
    return group.name if isinstance(group, Group) else group

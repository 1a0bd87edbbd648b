"""Groups, fused scales, and tensors that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantgate.formats import activations
from quantgate.formats.groups import group_of
from quantgate.formats.linear import read_linear
from quantgate.formats.numbers import decode_e2m1, decode_e8m0
from quantgate.formats.stored import StoredTensors
from quantgate.formats.weights import dequantize_weight


def test_e2m1_and_e8m0_are_what_the_mx_specification_lists() -> None:
    every = torch.arange(16, dtype=torch.uint8)[None]
    low_first = (every[:, ::2] | (every[:, 1::2] << 4)).contiguous()
    listed = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert decode_e2m1(low_first).tolist() == [listed + [-v for v in listed]]
    powers = decode_e8m0(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert powers[:255].tolist() == [2.0**e for e in range(-127, 128)]
    assert powers[255].isnan()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", "attention"),
        ("model.layers.0.mlp.up_proj", "rest"),
        ("model.layers.3.mlp.up_proj", None),
        ("lm_head", None),
    ],
)
def test_a_module_has_the_first_group_that_names_it(name: str, expected: str | None) -> None:
    config = {
        "format": "mixed-precision",
        "ignore": ["lm_head", r"re:.*layers\.3\..*"],
        "config_groups": {
            "group_0": {"targets": [r"re:.*self_attn\.[qkvo]_proj$"], "format": "attention"},
            "group_1": {"targets": ["Linear"], "format": "rest", "input_activations": None},
        },
    }
    group = group_of(name, "Linear", config)
    assert (group and group["format"]) == expected
    assert group_of(name, "Embedding", {**config, "config_groups": {}}) is None


def test_linears_that_vllm_fuses_have_fused_scales(tmp_path: Path) -> None:
    """FP8 is quantized again to the largest scale, NVFP4 takes the largest of both global ones."""
    linears = {name: f"layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    tensors = {}
    for number, linear in enumerate(linears.values(), start=1):
        tensors[f"{linear}.weight"] = torch.full((2, 2), 100.0).to(torch.float8_e4m3fn)
        tensors[f"{linear}.weight_scale"] = torch.tensor([0.01 * number])
        tensors[f"{linear}.input_scale"] = torch.tensor([0.5 * number])
    save_file(tensors, tmp_path / "model.safetensors")
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    group = {"weights": fp8, "input_activations": {**fp8, "dynamic": False}}
    q = read_linear(
        StoredTensors(tmp_path),
        linears["q_proj"],
        group,
        lambda own, group: dequantize_weight(own, group["weights"]),
    )
    # 100 rounds to 96 in E4M3; 0.96 / 0.03 = 32 is one of its numbers.
    torch.testing.assert_close(q.weight, torch.full((2, 2), 0.96), rtol=2**-10, atol=0)
    assert q.quantize_input is not None
    ones = torch.ones(1, 2)
    assert torch.equal(q.quantize_input(ones), activations.fp8_per_tensor(ones, torch.tensor(1.5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(4, 3)}, r"needs scales of shape \[4, 2\], got \[4, 3\]"),
        ({"weight_scale": None}, "no weight_scale for this layer"),
        ({"weight_shape": torch.tensor([5, 16])}, "says 5 rows, but weight_packed has 4; export"),
        ({"weight_shape": torch.tensor([4, 99])}, "do not hold 99"),
        ({"weight_g_idx": torch.arange(16)}, "must name one of 2 groups .* from 0 to 15"),
        ({"weight_packed": torch.zeros(4, 2)}, r"packed integers must be int32 .* torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    whole: dict[str, torch.Tensor | None] = {
        "weight_packed": torch.zeros(4, 2, dtype=torch.int32),
        "weight_scale": torch.ones(4, 2),
        "weight_shape": torch.tensor([4, 16]),
        **change,
    }
    tensors = {name: tensor for name, tensor in whole.items() if tensor is not None}
    weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}
    with pytest.raises(ValueError, match=message):
        dequantize_weight(tensors, weights)

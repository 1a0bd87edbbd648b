"""The embedded checkpoints' weights against compressed-tensors, and inputs against vLLM."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantgate.errors import BadInput
from quantgate.formats import activations
from quantgate.formats.library_weights import largest_disagreement
from quantgate.formats.linear import read_linear
from quantgate.formats.numbers import E2M1_MAGNITUDES, decode_e2m1
from quantgate.formats.stored import StoredTensors
from quantgate.formats.weights import dequantize_weight

ROWS = st.integers(1, 9)
SEED = st.integers(0, 2**16)


BUILD = Path(__file__).resolve().parents[2] / "build"
EMBEDDED = sorted(path.name for path in BUILD.glob("tiny-*"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_checkpoints_weights_are_the_librarys(name: str) -> None:
    """Bit for bit; but for NVFP4, where the library rounds twice to bfloat16 on its way."""
    linear, relative = largest_disagreement(BUILD / name)
    if "nvfp4" in name:
        assert 0 < relative <= 2**-7
        return
    assert relative == 0, linear


def test_every_format_is_embedded() -> None:
    assert len(EMBEDDED) == 38
    assert len([name for name in EMBEDDED if "actorder" in name]) == 1


@pytest.mark.parametrize("name", ["tiny-llama-nvfp4", "tiny-llama-nvfp4a16"])
def test_of_nvfp4_ours_is_the_definitions(name: str) -> None:
    """Code x scale / global scale, in float64, from every weight of a checkpoint."""
    stored = StoredTensors(BUILD / name)
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    linears = [module for module in stored.modules if "weight_packed" in stored.parts_of(module)]
    assert len(linears) == 4 * 7
    for linear in linears:
        own = stored.of_module(linear)
        scale = own["weight_scale"].double() / own["weight_global_scale"].double()
        exact = decode_e2m1(own["weight_packed"]).double() * scale.repeat_interleave(16, dim=1)
        ours = dequantize_weight(own, weights)
        torch.testing.assert_close(ours.double(), exact, rtol=2**-22, atol=0)


def ties(scale: torch.Tensor, columns: int) -> torch.Tensor:
    """Values on the half-way points between codes, where one way of dividing shows."""
    codes = torch.randint(-120, 120, (len(scale), columns)) + 0.5
    return codes * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_inputs_are_vllms(dtype: torch.dtype, symmetric: bool) -> None:
    """Codes, scales and zero points of vLLM's own operator, ties and a row of zeros included."""
    from vllm import _custom_ops

    torch.manual_seed(0)
    amax = torch.rand(2000, 1) * 5 + 0.1
    x = torch.cat([amax, -amax / 2, ties(amax / 127, 62)], dim=1).to(dtype)
    if symmetric:
        x[7] = 0.0
    codes, scale, zero_point = _custom_ops.scaled_int8_quant(x, symmetric=symmetric)
    offset = torch.zeros(()) if zero_point is None else zero_point.float()
    theirs = (codes.float() - offset) * scale
    assert torch.equal(activations.int8_per_token(x, symmetric=symmetric), theirs)

    one = torch.tensor([0.03])
    point = None if symmetric else torch.tensor([5], dtype=torch.int32)
    x = ties(one.expand(2000, 1), 64).to(dtype)
    codes, *_ = _custom_ops.scaled_int8_quant(x, one, point, symmetric=symmetric)
    theirs = (codes.float() - (0 if point is None else 5)) * one
    assert torch.equal(activations.int8_per_tensor(x, one, point), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_inputs_are_vllms(dtype: torch.dtype) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape

    torch.manual_seed(0)
    x = (torch.randn(500, 300) * torch.logspace(-6, 3, 500)[:, None]).to(dtype)
    x[7] = 0.0
    with set_current_vllm_config(VllmConfig()):
        per_token = QuantFP8(static=False, group_shape=GroupShape.PER_TOKEN)
        per_group = QuantFP8(static=False, group_shape=GroupShape(1, 128))
        per_tensor = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)
    codes, scale = per_token.forward_native(x)
    assert torch.equal(activations.fp8_per_token(x), codes.float() * scale)
    codes, scale = per_group.forward_native(x)
    spread = scale.repeat_interleave(128, dim=1)[:, :300]
    assert torch.equal(activations.fp8_per_group(x), codes.float() * spread)
    one = torch.tensor([0.7])
    codes, _ = per_tensor.forward_native(x, one)
    assert torch.equal(activations.fp8_per_tensor(x, one), codes.float() * one)


@given(rows=ROWS, groups=st.integers(1, 4), seed=SEED)
@settings(deadline=None)
def test_nvfp4_inputs_are_vllms(rows: int, groups: int, seed: int) -> None:
    """With vLLM's in-tree emulation; half of the numbers are half-way between two codes."""
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
        ref_nvfp4_quant_dequant,
    )

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups * 16, generator=generator)
    magnitudes = torch.tensor(E2M1_MAGNITUDES)
    half_ways = (magnitudes[1:] + magnitudes[:-1]) / 2
    x[:, ::2] = half_ways[torch.randint(7, x[:, ::2].shape, generator=generator)]
    x[:, 0] = 6.0
    for global_scale in (torch.tensor([448.0]), torch.tensor([1234.5])):
        theirs = ref_nvfp4_quant_dequant(x.clone(), global_scale, 16)
        assert torch.equal(activations.nvfp4(x, global_scale), theirs)


def test_int8_inputs_of_fused_linears_must_have_one_scale(tmp_path: Path) -> None:
    tensors = {}
    for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
        tensors[f"{name}.weight"] = torch.ones(2, 2, dtype=torch.int8)
        tensors[f"{name}.weight_scale"] = torch.ones(2, 1)
        tensors[f"{name}.input_scale"] = torch.tensor([1.0 + number])
    save_file(tensors, tmp_path / "model.safetensors")
    int8 = {"num_bits": 8, "type": "int"}
    group = {
        "weights": {**int8, "strategy": "channel"},
        "input_activations": {**int8, "strategy": "tensor", "dynamic": False},
    }
    with pytest.raises(BadInput, match=r"q_proj: input_scale is not the same .*\[1.0, 2.0, 3.0\]"):
        read_linear(
            StoredTensors(tmp_path),
            "q_proj",
            group,
            lambda own, group: dequantize_weight(own, group["weights"]),
        )

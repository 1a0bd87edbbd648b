"""The project's dequantizers against compressed-tensors', bit for bit, on anything of any shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantgate.errors import BadInput
from quantgate.formats import activations
from quantgate.formats.library_weights import largest_disagreement
from quantgate.formats.linear import read_linear
from quantgate.formats.numbers import E2M1_MAGNITUDES, decode_e2m1, unpack_integers
from quantgate.formats.stored import StoredTensors
from quantgate.formats.weights import dequantize_weight

ROWS = st.integers(1, 9)
SEED = st.integers(0, 2**16)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """For a comparison that tells 0.0 from -0.0 and sees NaN."""
    return tensor.float().view(torch.int32)


def args(**weights: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**weights)


def decompress(tensors: dict[str, torch.Tensor], format: str, weights: Any) -> torch.Tensor:
    """Return the weight that compressed-tensors' own compressor makes of a module's tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(format)
    weight: torch.Tensor = compressor.decompress(dict(tensors), scheme)["weight"]
    return weight


@given(bits=st.integers(1, 8), rows=ROWS, columns=st.integers(1, 70), dim=st.sampled_from([0, 1]))
@settings(deadline=None)
def test_unpacking_undoes_packing(bits: int, rows: int, columns: int, dim: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, columns)).to(torch.int8)
    packed = pack_to_int32(codes, bits, packed_dim=dim)
    assert torch.equal(unpack_integers(packed, bits, codes.shape[dim], dim), codes.int())


@given(
    bits=st.sampled_from([4, 8]),
    rows=ROWS,
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 8, 32]),
    symmetric=st.booleans(),
    ordered=st.booleans(),
    seed=SEED,
)
@settings(deadline=None)
def test_packed_integers(
    bits: int,
    rows: int,
    groups: int,
    group_size: int,
    symmetric: bool,
    ordered: bool,
    seed: int,
) -> None:
    """With and without zero points, and with columns in the order of their activations."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    generator = torch.Generator().manual_seed(seed)
    columns, half = groups * group_size, 2 ** (bits - 1)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(-half, half, shape, generator=generator).to(torch.int8)

    tensors = {
        "weight_packed": pack_to_int32(codes(rows, columns), bits),
        "weight_scale": torch.rand(rows, groups, generator=generator) + 0.01,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(codes(rows, groups), bits, packed_dim=0)
    if ordered:
        order = torch.randperm(columns, generator=generator)
        tensors["weight_g_idx"] = (torch.arange(columns) // group_size)[order].int()
    weights = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group",
        "group_size": group_size,
        "actorder": "group" if ordered else None,
    }
    ours = dequantize_weight(tensors, weights)
    theirs = decompress(tensors, "pack-quantized", args(**weights))
    assert torch.equal(bits_of(ours), bits_of(theirs))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    strategy=st.sampled_from(["tensor", "channel", "block"]),
    float8=st.booleans(),
    seed=SEED,
)
@settings(deadline=None)
def test_int8_and_fp8(rows: int, columns: int, strategy: str, float8: bool, seed: int) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-128, 128, (rows, columns), generator=generator)
    weight = values.float().to(torch.float8_e4m3fn) if float8 else values.to(torch.int8)
    shape = {
        "tensor": (1,),
        "channel": (rows, 1),
        "block": (-(-rows // 16), -(-columns // 8)),
    }[strategy]
    tensors = {"weight": weight, "weight_scale": torch.rand(shape, generator=generator) + 0.01}
    weights = {
        "num_bits": 8,
        "type": "float" if float8 else "int",
        "strategy": strategy,
        **({"block_structure": [16, 8]} if strategy == "block" else {}),
    }
    ours = dequantize_weight(tensors, weights)
    theirs = dequantize(weight, tensors["weight_scale"], args=args(**weights), dtype=torch.float32)
    assert torch.equal(bits_of(ours), bits_of(theirs))


@given(rows=ROWS, groups=st.integers(1, 5), seed=SEED)
@settings(deadline=None)
def test_nvfp4_divides_by_its_global_scale(rows: int, groups: int, seed: int) -> None:
    """In float32; compressed-tensors works in bfloat16 and differs: the definition is ours.

    NVFP4 is E2M1 x E4M3 / global scale, an exact product but for its one division: the float64
    result is met to float32's rounding, which bfloat16's intermediates miss by up to 2^-8.
    """
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows, groups * 8), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) * 400 + 1).to(torch.float8_e4m3fn)
    global_scale = torch.rand(1, generator=generator) * 3000 + 1
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale,
        "weight_global_scale": global_scale,
    }
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    ours = dequantize_weight(tensors, weights)
    exact = decode_e2m1(packed).double() * (
        scale.double() / global_scale.double()
    ).repeat_interleave(16, dim=1)
    torch.testing.assert_close(ours.double(), exact, rtol=2**-22, atol=0)
    theirs = decompress(tensors, "nvfp4-pack-quantized", args(**weights))
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-6, atol=0)


@given(rows=ROWS, groups=st.integers(1, 5), four=st.booleans(), seed=SEED)
@settings(deadline=None)
def test_mx_formats_are_exact_in_both(rows: int, groups: int, four: bool, seed: int) -> None:
    """Powers of two as scales: compressed-tensors' bfloat16 loses nothing, so bits are equal."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * 32
    exponents = torch.randint(90, 160, (rows, groups), generator=generator).to(torch.uint8)
    weights = {"num_bits": 4 if four else 8, "type": "float", "group_size": 32}
    if four:
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
        tensors = {"weight_packed": codes, "weight_scale": exponents}
    else:
        values = torch.randn(rows, columns, generator=generator) * 50
        tensors = {"weight": values.to(torch.float8_e4m3fn), "weight_scale": exponents}
    ours = dequantize_weight(tensors, {**weights, "strategy": "group"})
    theirs = decompress(
        tensors,
        "mxfp4-pack-quantized" if four else "mxfp8-quantized",
        args(**weights, strategy="group", scale_dtype=torch.uint8),
    )
    assert torch.equal(bits_of(ours), bits_of(theirs.float()))


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
    with pytest.raises(BadInput, match=r"q_proj: input_scale differs between .*\[1.0, 2.0, 3.0\]"):
        read_linear(
            StoredTensors(tmp_path),
            "q_proj",
            group,
            lambda own, group: dequantize_weight(own, group["weights"]),
        )


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

"""The project's dequantizers against compressed-tensors', bit for bit, on anything of any shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantgate.formats import activations
from quantgate.formats.groups import group_of
from quantgate.formats.linear import read_linear
from quantgate.formats.numbers import decode_e2m1, decode_e8m0, unpack_integers
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


def test_e2m1_and_e8m0_are_what_the_mx_specification_lists() -> None:
    every = torch.arange(16, dtype=torch.uint8)[None]
    low_first = (every[:, ::2] | (every[:, 1::2] << 4)).contiguous()
    listed = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert decode_e2m1(low_first).tolist() == [listed + [-v for v in listed]]
    powers = decode_e8m0(torch.arange(256, dtype=torch.int32).to(torch.uint8))
    assert powers[:255].tolist() == [2.0**e for e in range(-127, 128)]
    assert powers[255].isnan()


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
        ({"weight_shape": torch.tensor([5, 16])}, "weight_shape says 5 rows, weight_packed has 4"),
        ({"weight_shape": torch.tensor([4, 99])}, "do not hold 99"),
        ({"weight_g_idx": torch.arange(16)}, "must name one of 2 groups .* from 0 to 15"),
        ({"weight_packed": torch.zeros(4, 2)}, r"packed integers are int32 .* got torch.float32"),
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

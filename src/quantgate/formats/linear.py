"""A quantized linear layer as vLLM computes it: its weight, and the quantizer of its input.

vLLM loads q/k/v and gate/up into one layer each and fuses their scales: FP8 weights with per-tensor
scales are requantized to the largest of them (`requantize_with_max_scale`), NVFP4 uses the largest
global scale for weights and for inputs, and static FP8 inputs use the largest scale. (vLLM 0.32.0,
layers/quantization/compressed_tensors/schemes.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantgate.errors import BadInput
from quantgate.formats import activations
from quantgate.formats.builds import fp8_rule, int8_rule, symmetric_rule
from quantgate.formats.groups import Group, fused_with
from quantgate.formats.kernels import FORMATS_RULES, LinearRules, family_of
from quantgate.formats.numbers import to_e4m3
from quantgate.formats.weights import Tensors
from quantgate.subject.scheme import is_mx

if TYPE_CHECKING:
    import torch

    from quantgate.formats.stored import TensorsByName

Dequantizer = Callable[[Tensors, Group], "torch.Tensor"]
Quantizer = Callable[["torch.Tensor"], "torch.Tensor"]
# Inputs as kernels of `LinearRules.int8` take them, whatever the format says.
INT8_PER_TOKEN = {"type": "int", "dynamic": True, "symmetric": True}


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear of a checkpoint, dequantized."""

    weight: torch.Tensor
    """float32 [out, in]."""
    quantize_input: Quantizer | None
    """Quantizes and dequantizes x [rows, in], to float32; None if inputs are not quantized."""


def read_linear(
    stored: TensorsByName,
    name: str,
    group: Group,
    dequantize: Dequantizer,
    rules: LinearRules = FORMATS_RULES,
) -> QuantizedLinear:
    """Read one linear as vLLM fuses and serves it; `BadInput` if its tensors do not fit the format.

    `rules` are those of the kernels that serve it.
    """
    try:
        return QuantizedLinear(
            _weight(stored, name, group, dequantize, rules),
            _input_quantizer(stored, name, group, rules),
        )
    except ValueError as error:
        raise BadInput(f"{stored.directory}: {name}: {error}") from None


def _weight(
    stored: TensorsByName, name: str, group: Group, dequantize: Dequantizer, rules: LinearRules
) -> torch.Tensor:
    tensors, weights = stored.of_module(name), group["weights"]
    if "weight_global_scale" in tensors:
        tensors["weight_global_scale"] = _largest(stored, name, "weight_global_scale")
    if rules.fp8_products and family_of(group) == "packed" and group.get("input_activations"):
        return _fp8_products(tensors, group, dequantize)
    weight = dequantize(tensors, group)
    per_tensor = weights.get("type") == "float" and weights.get("strategy") == "tensor"
    if per_tensor and group.get("input_activations"):
        return _requantized(weight, _largest(stored, name, "weight_scale"))
    return weight


def _fp8_products(
    tensors: dict[str, torch.Tensor], group: Group, dequantize: Dequantizer
) -> torch.Tensor:
    """Return W4AFP8 weights as Cutlass multiplies them.

    Each channel's scales are quantized to E4M3 like a row of inputs, and stored divided by eight so
    that products with codes stay in range; these products are rounded to E4M3.
    """
    import torch

    scale = tensors["weight_scale"].float()
    channel = activations.fp8_scale_per_token(scale)
    eighth = to_e4m3(fp8_rule()(scale, channel)).float() / 8
    rounded = {**tensors, "weight_scale": eighth.to(torch.float8_e4m3fn).float()}
    return to_e4m3(dequantize(rounded, group)).float() * (channel * 8)


def _requantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Requantize FP8 weights to the scale of their fused layer, by way of float16 as vLLM does."""
    import torch

    return activations.fp8_per_tensor(weight.to(torch.float16), scale)


def _largest(stored: TensorsByName, name: str, part: str) -> torch.Tensor:
    """Return a scale's maximum over the linears that vLLM fuses with this one, float32 [1]."""
    import torch

    scales = [
        stored.read(f"{shard}.{part}").float().reshape(-1)
        for shard in fused_with(name)
        if f"{shard}.{part}" in stored
    ]
    if not scales:
        raise ValueError(f"the checkpoint has no {part} for this layer.")
    return torch.cat(scales).max().reshape(1)


def _input_quantizer(
    stored: TensorsByName, name: str, group: Group, rules: LinearRules
) -> Quantizer | None:
    family = family_of(group)
    inputs = INT8_PER_TOKEN if family in rules.int8 else group.get("input_activations")
    if not inputs or family in rules.kept:
        return None
    if inputs.get("type") == "int":
        return _int8_quantizer(stored, name, inputs, rules)
    if is_mx(inputs):
        return None  # vLLM's emulation and its Marlin kernels keep inputs; see docs/formats.md
    if inputs["num_bits"] == 4:
        global_scale = _largest(stored, name, "input_global_scale")
        return lambda x: activations.nvfp4(x, global_scale)
    return _fp8_quantizer(stored, name, inputs)


def _int8_quantizer(
    stored: TensorsByName, name: str, inputs: dict[str, Any], rules: LinearRules
) -> Quantizer:
    symmetric = bool(inputs.get("symmetric", True))
    # Refuse an unknown rule here, where the message can name the checkpoint and layer.
    (symmetric_rule if symmetric else int8_rule)()
    if inputs.get("dynamic"):
        return lambda x: activations.int8_per_token(x, symmetric=symmetric)
    scale = _the_one(stored, name, "input_scale")
    zero_point = None if symmetric else _the_one(stored, name, "input_zero_point")
    if zero_point is not None and rules.truncates_zero_points:
        scale, zero_point = _from_their_range(scale.float(), zero_point.float())
    return lambda x: activations.int8_per_tensor(x, scale, zero_point)


def _from_their_range(
    scale: torch.Tensor, zero_point: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a static scale and zero point as vLLM's Cutlass kernel computes them from their range.

    For several linears in one, it takes the whole range of all, and does so for a single one too.
    On CUDA torch divides by 255 as a product with its reciprocal, so the scale grows by its last
    bit, and the zero point, 3.99998 for 4, is truncated.
    """
    lowest = scale * (activations.INT8_LOWEST - zero_point)
    highest = scale * (activations.INT8_HIGHEST - zero_point)
    steps = scale.new_tensor(activations.INT8_HIGHEST - activations.INT8_LOWEST)
    scale = (highest - lowest) * steps.reciprocal()
    return scale, (activations.INT8_LOWEST - lowest / scale).trunc()


def _the_one(stored: TensorsByName, name: str, part: str) -> torch.Tensor:
    """Return a static int8 input's scale or zero point, which all fused linears must share.

    vLLM keeps the one it loads last, so a checkpoint must not hold different ones.
    """
    values = {
        float(stored.read(f"{shard}.{part}"))
        for shard in fused_with(name)
        if f"{shard}.{part}" in stored
    }
    if len(values) > 1:
        raise ValueError(
            f"{part} differs between the layers that vLLM fuses ({sorted(values)}), and vLLM would "
            "use the last one for all; export the checkpoint again with one value."
        )
    return stored.read(f"{name}.{part}").reshape(1)


def _fp8_quantizer(stored: TensorsByName, name: str, inputs: dict[str, Any]) -> Quantizer:
    if not inputs.get("dynamic"):
        scale = _largest(stored, name, "input_scale")
        return lambda x: activations.fp8_per_tensor(x, scale)
    if inputs.get("strategy") == "token":
        fp8_rule()  # refuses an unknown one here, as for int8
        return activations.fp8_per_token
    return lambda x: activations.fp8_per_group(x, inputs["group_size"])

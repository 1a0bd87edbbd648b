"""Emulated experts: dequantized once after loading, and multiplied in float32, expert by expert.

vLLM's CPU builds have no kernel for most quantized experts. As with linears, only the products are
emulated. vLLM creates and loads the stacked weights, shards them, chooses each token's experts and
weighs their outputs; its operators quantize inputs and compute the activation.

Import this after vLLM's layers.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    GroupShape,
    unpack_quantized_values_into_int32,
)

from quantgate.formats.numbers import decode_e2m1, decode_e8m0
from quantgate.patches.emulated_kernels import dequantize_groups

# One expert's tensors by their names without "w13_" or "w2_"; vLLM's method for its format.
Tensors = Mapping[str, torch.Tensor]
Dequantizer = Callable[[Tensors, Any], torch.Tensor]
Quantizer = Callable[[torch.Tensor], torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]

STACKS = ("w13", "w2")
BIAS = "bias"
# How a refusal begins; `measuring/unsupported.py` turns it into a sentence.
NOT_EMULATED = "no MoE backend on CPU"


class DequantizingExperts(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer, created and loaded by vLLM's own method for their format."""

    emulated = True

    def __init__(self, stock: Any) -> None:
        super().__init__(stock.moe)
        self.stock = stock
        self.format = FORMATS[type(stock).__name__]
        self.quantize = self.format.quantizer(stock)
        self.watch: Callable[[Products], None] | None = None
        """Called with each call's products; set while an engine is captured."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Create the parameters that vLLM loads the checkpoint into."""
        self.stock.create_weights(layer, *args, **kwargs)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Return None: there is no kernel to configure."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace what was loaded with `w13_weight` and `w2_weight`, float32 [experts, out, in]."""
        if any(getattr(p, "is_transposed", False) for p in layer.parameters(recurse=False)):
            raise NotImplementedError(f"{NOT_EMULATED}: experts loaded transposed are not emulated")
        for stack in STACKS:
            loaded = {
                name.removeprefix(f"{stack}_"): parameter.data
                for name, parameter in layer.named_parameters(recurse=False)
                if name.startswith(f"{stack}_") and not name.endswith(BIAS)
            }
            weight = torch.stack(
                [
                    self.format.dequantize({n: t[expert] for n, t in loaded.items()}, self.stock)
                    for expert in range(layer.local_num_experts)
                ]
            )
            if not self.format.quantizes_inputs:
                # The default dtype while vLLM loads is the serving dtype, which a kernel would use.
                weight = weight.to(torch.get_default_dtype()).float()
            for name in loaded:
                delattr(layer, f"{stack}_{name}")
            layer.register_parameter(f"{stack}_weight", torch.nn.Parameter(weight, False))
        _LAYERS[layer.layer_name] = layer

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *_: Any,
        **__: Any,
    ) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs for x [tokens, H]."""
        total: torch.Tensor = _apply(x, topk_weights, topk_ids, layer.layer_name)
        return total

    def compute(
        self, layer: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        """Return what `apply` does; how many rows an expert gets depends on the data."""
        weigh_first = layer.apply_router_weight_on_input
        rows = x * topk_weights.to(x.dtype) if weigh_first else x  # vLLM: for one expert a token
        products = Products() if self.watch is not None else None
        total = sum_of_experts(
            rows,
            Routing(topk_ids, torch.ones_like(topk_weights) if weigh_first else topk_weights),
            Stacked(_stack(layer, "w13"), _stack(layer, "w2"), layer.expert_map),
            Rule(self.quantize, functools.partial(_activated, layer.activation)),
            products,
        )
        if self.watch is not None and products is not None:
            self.watch(products)
        return total


# A compiled model cannot trace a loop over experts. It calls an operator, which finds a layer here.
_LAYERS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


@torch.library.custom_op(
    "quantgate::emulated_experts",
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor ids, str layer) -> Tensor",
)
def _apply(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    found = _LAYERS[layer]
    total: torch.Tensor = found.quant_method.compute(found, x, weights, ids)
    return total


@_apply.register_fake
def _(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, layer: str) -> torch.Tensor:
    return torch.empty_like(x)


class Format(NamedTuple):
    """How vLLM stores one format's experts, and which inputs their kernels quantize."""

    dequantize: Dequantizer
    """Returns one expert's weight, float32 [out, in]."""
    quantizer: Callable[[Any], Quantizer] = lambda _: torch.Tensor.float
    """Returns the function that quantizes and dequantizes x [rows, in], to float32."""
    quantizes_inputs: bool = False


class Routing(NamedTuple):
    """The experts of each token and their weights, both [tokens, k]; a negative one is none."""

    ids: torch.Tensor
    weights: torch.Tensor


class Stacked(NamedTuple):
    """The experts of one rank: each stack's weight [experts, out, in] and bias, which may be None.

    `places` maps the number of an expert to its place in the stacks, -1 if another rank has it.
    """

    gate_up: tuple[torch.Tensor, torch.Tensor | None]
    down: tuple[torch.Tensor, torch.Tensor | None]
    places: torch.Tensor | None = None


class Rule(NamedTuple):
    """What happens to the inputs of experts, and between their two products."""

    quantize: Quantizer
    activate: Activation


@dataclass
class Products:
    """What the products of one call gave for each token and each of its experts."""

    seen: dict[str, torch.Tensor] = field(default_factory=dict)
    """"gate_up" [tokens, k, out], what `activate` made of it, "activated" [tokens, k, in], and
    "down" [tokens, k, H], not weighed yet. Zero for experts of other ranks."""

    def add(self, name: str, routing: Routing, at: tuple[torch.Tensor, ...], rows: Any) -> None:
        """Note the rows [n, width] of the tokens and places `at`, both [n]."""
        whole = (*routing.ids.shape, rows.shape[1])
        self.seen.setdefault(name, rows.new_zeros(whole))[at] = rows


def sum_of_experts(
    x: torch.Tensor,
    routing: Routing,
    experts: Stacked,
    rule: Rule,
    products: Products | None = None,
) -> torch.Tensor:
    """Return the weighted sum of the chosen experts' outputs for x [tokens, H], in x's dtype.

    Products, weights and sums are in float32. Gate and up and the activation are rounded to x's
    dtype, as linears are, and so is the sum. `products` notes what is between.
    """
    places = routing.ids if experts.places is None else experts.places[routing.ids]
    values = rule.quantize(x)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for place in torch.unique(places).tolist():
        if place < 0:
            continue
        at = tokens, slots = torch.where(places == place)
        gate_up = _product(values[tokens], experts.gate_up, place).to(x.dtype)
        activated = rule.activate(gate_up)
        down = _product(rule.quantize(activated), experts.down, place)
        total.index_add_(0, tokens, down * routing.weights[tokens, slots, None].float())
        if products is not None:
            for name, rows in {"gate_up": gate_up, "activated": activated, "down": down}.items():
                products.add(name, routing, at, rows)
    return total.to(x.dtype)


def _product(
    values: torch.Tensor, stack: tuple[torch.Tensor, torch.Tensor | None], place: int
) -> torch.Tensor:
    weight, bias = stack
    return torch.nn.functional.linear(
        values, weight[place], None if bias is None else bias[place].float()
    )


def _stack(layer: Any, stack: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return getattr(layer, f"{stack}_weight"), getattr(layer, f"{stack}_{BIAS}", None)


def _activated(activation: Any, values: torch.Tensor) -> torch.Tensor:
    """Return vLLM's own activation of values [rows, out]."""
    width = values.shape[1] // 2 if activation.is_gated else values.shape[1]
    output = values.new_empty(len(values), width)
    apply_moe_activation(activation, output, values)
    return output


# The formats ------------------------------------------------------------------------------------


def _integers(tensors: Tensors, stock: Any) -> torch.Tensor:
    scale = tensors["weight_scale"]
    codes = unpack_quantized_values_into_int32(
        tensors["weight_packed"], stock.quant_type, packed_dim=1
    )
    if (packed := tensors.get("weight_zero_point")) is None:
        offset = torch.full_like(scale, 1 << (stock.num_bits - 1), dtype=torch.int32)
    else:
        offset = unpack_quantized_values_into_int32(packed, stock.quant_type, packed_dim=0)
    return dequantize_groups(codes, scale, offset)


def _channels_or_blocks(tensors: Tensors, stock: Any) -> torch.Tensor:
    weight, scale = tensors["weight"].float(), tensors["weight_scale"].float()
    if (block := getattr(stock, "weight_block_size", None)) is None:
        return weight * scale
    rows, columns = weight.shape
    spread = scale.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return weight * spread[:rows, :columns]


def _nvfp4(tensors: Tensors, _: Any) -> torch.Tensor:
    # vLLM takes the gate's global scale for gate and up.
    overall = tensors["weight_global_scale"].float().reshape(-1)[0].reciprocal()
    return _fp4(tensors, tensors["weight_scale"].float() * overall)


def _mxfp4(tensors: Tensors, _: Any) -> torch.Tensor:
    return _fp4(tensors, decode_e8m0(tensors["weight_scale"]))


def _fp4(tensors: Tensors, scale: torch.Tensor) -> torch.Tensor:
    codes = decode_e2m1(tensors["weight_packed"])
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)


def _int8_inputs(_: Any) -> Quantizer:
    from vllm._custom_ops import scaled_int8_quant

    def quantize(x: torch.Tensor) -> torch.Tensor:
        codes, scale, _ = scaled_int8_quant(x.contiguous())
        values: torch.Tensor = codes.float() * scale
        return values

    return quantize


def _fp8_inputs(stock: Any) -> Quantizer:
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8

    block = stock.weight_block_size
    shape = GroupShape.PER_TOKEN if block is None else GroupShape(1, block[1])
    quant_fp8 = QuantFP8(static=False, group_shape=shape)

    def quantize(x: torch.Tensor) -> torch.Tensor:
        codes, scale = quant_fp8.forward_native(x)
        spread = scale.repeat_interleave(-(-x.shape[1] // scale.shape[1]), dim=1)
        values: torch.Tensor = codes.float() * spread[:, : x.shape[1]]
        return values

    return quantize


FORMATS: dict[str, Format] = {
    "CompressedTensorsWNA16MoEMethod": Format(_integers),
    "CompressedTensorsW8A8Int8MoEMethod": Format(_channels_or_blocks, _int8_inputs, True),
    "CompressedTensorsW8A8Fp8MoEMethod": Format(_channels_or_blocks, _fp8_inputs, True),
    "CompressedTensorsW4A4Nvfp4MoEMethod": Format(_nvfp4),
    "CompressedTensorsW4A4Mxfp4MoEMethod": Format(_mxfp4),
}


def emulated(stock: Any) -> DequantizingExperts:
    """Return the emulation of what vLLM's method would do with a layer's experts.

    Raises `NotImplementedError` for a format that is not emulated.
    """
    if (why := _why_not(stock)) is not None:
        raise NotImplementedError(f"{NOT_EMULATED}: {why} are not emulated")
    return DequantizingExperts(stock)


def _why_not(stock: Any) -> str | None:
    """Return which of a format's experts are not emulated, if these are."""
    if type(stock).__name__ not in FORMATS:
        return f"experts of {type(stock).__name__}"
    inputs = getattr(stock, "input_quant", None)
    if inputs is not None and not inputs.dynamic:
        return "experts with static input scales"
    if inputs is not None and not inputs.symmetric:
        return "experts with asymmetric inputs"
    if not getattr(stock, "use_a16", True):
        return "experts with NVFP4 inputs"
    return None

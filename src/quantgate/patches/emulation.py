"""Emulated kernels for formats that this machine's vLLM build lacks; verdicts always name them.

Only the matrix product is emulated. vLLM's own loading, sharding and fusing of q/k/v still run,
and that is where most real bugs are. An emulated kernel never counts as evidence about the real
one.

`[engine] kernels` selects one of two kinds. "native": vLLM's kernel if the build has one, an
emulated one otherwise. "portable": always an emulated one, so that a golden holds on every x86-64
machine. Only vLLM's CPU platform is patched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from quantgate.patches.scoremode.hooks import EMULATION, EXPERTS, hook
from quantgate.patches.wanted import (
    ADDITIONAL_CONFIG_KEY,
    EMULATED_KV_SCALES,
    EMULATED_LINEAR,
    PORTABLE,
    portable_wanted,
    static_fp8_is_missing,
    wanted,
)

COMPRESSED_TENSORS = "vllm.model_executor.layers.quantization.compressed_tensors"


def engine_arguments(kernels: str, kv_cache_scheme: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the arguments of `vllm.LLM` for a kind of kernels.

    On CPU a quantized KV cache is emulated by quantizing keys and values before they enter an
    unquantized one. The scheme is hidden from vLLM, whose own CPU kernel needs AVX-512 or AMX.
    """
    wanted: dict[str, Any] = {"kernels": kernels}
    arguments: dict[str, Any] = {"additional_config": {ADDITIONAL_CONFIG_KEY: wanted}}
    if kernels == PORTABLE and kv_cache_scheme is not None:
        wanted["kv_cache"] = "fp8"
        arguments["hf_overrides"] = _without_kv_cache_scheme
    return arguments


def _without_kv_cache_scheme(config: Any) -> Any:
    if getattr(config, "quantization_config", None) is None:  # vLLM parses the file twice
        return config
    config.quantization_config = {**config.quantization_config, "kv_cache_scheme": None}
    return config


def register_kernels(module: ModuleType) -> None:
    """Add the emulated kernels to vLLM's tables for the CPU (vllm…kernels.linear)."""
    from vllm.platforms import PlatformEnum, current_platform

    from quantgate.patches.emulated_kernels import KERNELS

    if not current_platform.is_cpu():
        return

    for table, kernels in KERNELS.items():
        # First, because vLLM's CPU kernels accept builds in which their operator does not exist.
        # An emulated kernel declines if it is not wanted.
        possible = getattr(module, table).setdefault(PlatformEnum.CPU, [])
        possible[:0] = kernels


@hook(
    f"{COMPRESSED_TENSORS}.schemes.compressed_tensors_w4a4_nvfp4",
    "init_nvfp4_linear_kernel",
    feature=EMULATION,
    cpu_only=True,
)
def init_nvfp4_linear_kernel(stock: Any, use_a16: Any = False, *args: Any, **kwargs: Any) -> Any:
    """Let NVFP4A16 load on CPU, where vLLM would require Marlin."""
    if use_a16:
        from quantgate.patches.emulated_kernels import weight_only_nvfp4

        return weight_only_nvfp4()
    return stock(use_a16, *args, **kwargs)


@hook(
    f"{COMPRESSED_TENSORS}.compressed_tensors",
    "CompressedTensorsConfig._is_fp8_w4a8_sm90",
    feature=EMULATION,
    cpu_only=True,
)
def is_fp8_w4a8_sm90(
    stock: Any, cls: Any, weight_quant: Any, input_quant: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let W4AFP8 load on CPU: vLLM's scheme requires SM 9.0, but its loading does not."""
    return cls._is_fp8_w4a8(weight_quant, input_quant)


@hook(
    f"{COMPRESSED_TENSORS}.compressed_tensors",
    "CompressedTensorsKVCacheMethod.process_weights_after_loading",
    feature=EMULATION,
    cpu_only=True,
)
def process_weights_after_loading(
    stock: Any, method: Any, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Keep the KV scales if the cache is emulated."""
    answer = stock(layer, *args, **kwargs)
    if wanted().get("kv_cache") == "fp8":
        setattr(layer, EMULATED_KV_SCALES, (layer._k_scale_float, layer._v_scale_float))
    return answer


@hook("vllm._custom_ops", "scaled_fp8_quant", feature=EMULATION, cpu_only=True)
def scaled_fp8_quant(stock: Any, input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Implement static FP8 quantization, an empty stub in vLLM's CPU builds."""
    if scale is not None and (portable_wanted() or static_fp8_is_missing()):
        from quantgate.formats.numbers import to_e4m3

        scaled = input.float() * scale.float().reciprocal()
        return to_e4m3(scaled), scale
    return stock(input, scale, *args, **kwargs)


@hook(
    "vllm.model_executor.layers.linear",
    "UnquantizedLinearMethod.process_weights_after_loading",
    feature=EMULATION,
    cpu_only=True,
)
def process_unquantized_linear(
    stock: Any, method: Any, layer: Any, *args: Any, **kwargs: Any
) -> Any:
    """Multiply 16-bit numbers in float32 if portable kernels are requested.

    A build's own 16-bit product sums differently from processor to processor and is ten times
    slower without AVX512-BF16.
    """
    if not portable_wanted() or not _is_16_bit(layer.weight):
        return stock(layer, *args, **kwargs)
    # Before the stock method, which may pack the weight for its own kernel.
    float32 = layer.weight.detach().float()
    answer = stock(layer, *args, **kwargs)
    layer.cpu_linear = functools.partial(_float32_linear, float32)
    setattr(layer, EMULATED_LINEAR, True)
    return answer


@hook(
    f"{COMPRESSED_TENSORS}.compressed_tensors",
    "CompressedTensorsConfig.get_quant_method",
    feature=EXPERTS,
    cpu_only=True,
)
def get_quant_method(
    stock: Any, config: Any, layer: Any, prefix: Any, *args: Any, **kwargs: Any
) -> Any:
    """Emulate quantized experts on CPU, under either kind of kernels.

    vLLM's own kernels for them need AVX-512 or AMX, and their rules for inputs are their own.
    """
    method = stock(layer, prefix, *args, **kwargs)
    if type(method).__name__.startswith("CompressedTensors") and hasattr(method, "moe"):
        from quantgate.patches.emulated_experts import emulated

        return emulated(method)
    return method


def _no_backend(stock: Any, *args: Any, **kwargs: Any) -> tuple[None, None]:
    """Let vLLM's methods for quantized experts be built on CPU: only their loading is used."""
    if getattr(kwargs.get("quant_config"), "strategy", None) == "channel":
        # vLLM's method for integer weights then asserts that its kernel is Marlin.
        raise NotImplementedError(
            "no MoE backend on CPU: integer experts with a scale per channel are not emulated"
        )
    return None, None


for _format, _name in {
    "wna16": "select_wna16_moe_backend",
    "w8a8_int8": "select_int8_moe_backend",
    "w8a8_fp8": "select_fp8_moe_backend",
    "w4a4_nvfp4": "select_nvfp4_moe_backend",
}.items():
    hook(
        f"{COMPRESSED_TENSORS}.compressed_tensors_moe.compressed_tensors_moe_{_format}",
        _name,
        feature=EXPERTS,
        optional=_format == "wna16",  # vLLM 0.26 chooses no backend for these
        cpu_only=True,
    )(_no_backend)


def _is_16_bit(weight: Any) -> bool:
    return bool(weight.is_floating_point() and weight.itemsize == 2 and not weight.is_meta)


def _float32_linear(float32: Any, x: Any, _weight: Any, bias: Any = None) -> Any:
    """Return x [..., in] times the weight [out, in], summed in float32 and rounded once."""
    import torch

    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), float32, bias).to(x.dtype)


@hook(
    "vllm.model_executor.layers.attention.attention",
    "Attention.forward",
    feature=EMULATION,
    cpu_only=True,
)
def attention_forward(
    stock: Any, layer: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> Any:
    """Quantize keys and values before they enter the cache, if a quantized cache is emulated."""
    if (scales := getattr(layer, EMULATED_KV_SCALES, None)) is not None:
        from quantgate.formats.activations import fp8_cached

        key, value = (fp8_cached(x, scale) for x, scale in zip((key, value), scales, strict=True))
    return stock(query, key, value, *args, **kwargs)

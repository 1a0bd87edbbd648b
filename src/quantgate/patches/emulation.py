"""Kernels for formats that this machine's vLLM build lacks; always visible in the verdict.

vLLM's own loading, sharding and fusing of q/k/v still run, which is where most real bugs live: only
the product is emulated. An emulated kernel never counts as evidence about the real one.

An engine is asked for one of two kinds (`[engine] kernels`). "native": a kernel of vLLM's wherever
the build has one, an emulated one elsewhere. "portable": emulated ones everywhere, so that a golden
holds on every x86-64 machine. Only vLLM's CPU platform is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from quantgate.patches.scoremode.hooks import EMULATION, hook
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
    """Return what `vllm.LLM` is given for a kind of kernels.

    A quantized KV cache is emulated on CPU by quantizing keys and values on their way into an
    unquantized one, so vLLM must not be told of it: its CPU kernel needs AVX-512 or AMX.
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
    """Offer the emulated kernels to vLLM's choice of kernels on CPU (vllm…kernels.linear)."""
    from vllm.platforms import PlatformEnum, current_platform

    from quantgate.patches.emulated_kernels import KERNELS

    if not current_platform.is_cpu():
        return

    for table, kernels in KERNELS.items():
        # First, not last: vLLM's CPU kernels claim builds in which their operator does not exist.
        # An emulated one declines where it is not wanted.
        possible = getattr(module, table).setdefault(PlatformEnum.CPU, [])
        possible[:0] = kernels


@hook(
    f"{COMPRESSED_TENSORS}.schemes.compressed_tensors_w4a4_nvfp4",
    "init_nvfp4_linear_kernel",
    feature=EMULATION,
    cpu_only=True,
)
def init_nvfp4_linear_kernel(stock: Any, use_a16: Any = False, *args: Any, **kwargs: Any) -> Any:
    """Let NVFP4A16 load on CPU, where vLLM would insist on Marlin."""
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
    """Let W4AFP8 load on CPU: vLLM's scheme asks for SM 9.0; its loading does not."""
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
    """Keep KV scales where the cache is emulated."""
    answer = stock(layer, *args, **kwargs)
    if wanted().get("kv_cache") == "fp8":
        setattr(layer, EMULATED_KV_SCALES, (layer._k_scale_float, layer._v_scale_float))
    return answer


@hook("vllm._custom_ops", "scaled_fp8_quant", feature=EMULATION, cpu_only=True)
def scaled_fp8_quant(stock: Any, input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Give static FP8 quantization a body: vLLM's CPU builds have an empty stub of it."""
    if scale is not None and (portable_wanted() or static_fp8_is_missing()):
        from quantgate.formats.activations import to_e4m3

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
    """Multiply 16-bit numbers in float32 where portable kernels are asked for.

    What a build has for 16-bit products differs from processor to processor, in how it adds up and,
    without AVX512-BF16, tenfold in speed.
    """
    if not portable_wanted() or not _is_16_bit(layer.weight):
        return stock(layer, *args, **kwargs)
    # Before the stock method, which may pack the weight for a kernel of its own.
    float32 = layer.weight.detach().float()
    answer = stock(layer, *args, **kwargs)
    layer.cpu_linear = functools.partial(_float32_linear, float32)
    setattr(layer, EMULATED_LINEAR, True)
    return answer


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
    """Quantize keys and values on their way into the cache where a quantized cache is emulated."""
    if (scales := getattr(layer, EMULATED_KV_SCALES, None)) is not None:
        from quantgate.formats.activations import fp8_cached

        key, value = (fp8_cached(x, scale) for x, scale in zip((key, value), scales, strict=True))
    return stock(query, key, value, *args, **kwargs)

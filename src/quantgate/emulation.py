"""Kernels for formats that this machine's vLLM build lacks; always visible in the verdict.

vLLM's own loading, sharding and fusing of q/k/v still run, which is where most real bugs live: only
the product is emulated. An emulated kernel never counts as evidence about the real one.

An engine is asked for one of two kinds (`[engine] kernels`). "native": a kernel of vLLM's wherever
the build has one, an emulated one elsewhere. "portable": emulated ones everywhere, so that a golden
holds on every x86-64 machine. Only vLLM's CPU platform is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# The key in vLLM's `additional_config`, which reaches every process of an engine.
ADDITIONAL_CONFIG_KEY = "quantgate"
PORTABLE = "portable"
NATIVE = "native"
# Where an attention layer keeps the scales (k, v) of an emulated FP8 KV cache.
EMULATED_KV_SCALES = "quantgate_kv_scales"
# What marks an unquantized layer whose products are emulated.
EMULATED_LINEAR = "quantgate_float32_linear"


def is_emulated(kernel: object) -> bool:
    """Whether a vLLM kernel object computes in floating point on dequantized weights."""
    return bool(getattr(kernel, "emulated", False)) or type(kernel).__name__.startswith("Emulation")


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


def wanted() -> Mapping[str, Any]:
    """Return what the engine that is being loaded was asked for."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    found: Mapping[str, Any] = ((config and config.additional_config) or {}).get(
        ADDITIONAL_CONFIG_KEY, {}
    )
    return found


def portable_wanted() -> bool:
    """Whether the engine that is being loaded was asked for portable kernels."""
    return bool(wanted().get("kernels", NATIVE) == PORTABLE)


def register_kernels(module: ModuleType) -> None:
    """Offer the emulated kernels to vLLM's choice of kernels on CPU (vllm…kernels.linear)."""
    from vllm.platforms import PlatformEnum

    from quantgate.emulated_kernels import KERNELS

    for table, kernels in KERNELS.items():
        # First, not last: vLLM's CPU kernels claim builds in which their operator does not exist.
        # An emulated one declines where it is not wanted.
        possible = getattr(module, table).setdefault(PlatformEnum.CPU, [])
        possible[:0] = kernels


def patch_nvfp4_scheme(module: Any) -> None:
    """Let NVFP4A16 load on CPU, where vLLM would insist on Marlin."""
    from quantgate.emulated_kernels import weight_only_nvfp4

    original = module.init_nvfp4_linear_kernel

    def init_nvfp4_linear_kernel(use_a16: bool = False) -> Any:
        if use_a16:
            return weight_only_nvfp4()
        return original(use_a16=use_a16)

    module.init_nvfp4_linear_kernel = init_nvfp4_linear_kernel


def patch_compressed_tensors(module: ModuleType) -> None:
    """Let W4AFP8 load on CPU, and keep KV scales where the cache is emulated.

    vLLM's scheme for W4AFP8 asks for SM 9.0; its loading does not.
    """
    config = module.CompressedTensorsConfig
    config._is_fp8_w4a8_sm90 = classmethod(
        lambda cls, weight_quant, input_quant: cls._is_fp8_w4a8(weight_quant, input_quant)
    )
    method = module.CompressedTensorsKVCacheMethod
    original = method.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        original(self, layer)
        if wanted().get("kv_cache") == "fp8":
            setattr(layer, EMULATED_KV_SCALES, (layer._k_scale_float, layer._v_scale_float))

    method.process_weights_after_loading = process_weights_after_loading


def patch_custom_ops(module: Any) -> None:
    """Give static FP8 quantization a body: vLLM's CPU builds have an empty stub of it."""
    from quantgate.formats.activations import to_e4m3

    original = module.scaled_fp8_quant

    def scaled_fp8_quant(input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scale is not None and (portable_wanted() or static_fp8_is_missing()):
            scaled = input.float() * scale.float().reciprocal()
            return to_e4m3(scaled), scale
        return original(input, scale, *args, **kwargs)

    module.scaled_fp8_quant = scaled_fp8_quant


def patch_unquantized_linear(module: ModuleType) -> None:
    """Multiply 16-bit numbers in float32 where portable kernels are asked for.

    What a build has for 16-bit products differs from processor to processor, in how it adds up and,
    without AVX512-BF16, tenfold in speed.
    """
    method = module.UnquantizedLinearMethod
    original = method.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        # Before the original, which may pack the weight for a kernel of its own.
        float32 = layer.weight.detach().float() if _is_16_bit(layer.weight) else None
        original(self, layer)
        if float32 is not None and portable_wanted():
            layer.cpu_linear = functools.partial(_float32_linear, float32)
            setattr(layer, EMULATED_LINEAR, True)

    method.process_weights_after_loading = process_weights_after_loading


def _is_16_bit(weight: Any) -> bool:
    return bool(weight.is_floating_point() and weight.itemsize == 2 and not weight.is_meta)


def _float32_linear(float32: Any, x: Any, _weight: Any, bias: Any = None) -> Any:
    """Return x [..., in] times the weight [out, in], summed in float32 and rounded once."""
    import torch

    bias = None if bias is None else bias.float()
    return torch.nn.functional.linear(x.float(), float32, bias).to(x.dtype)


@functools.cache
def static_fp8_is_missing() -> bool:
    """Whether this build's operator for static FP8 quantization is an empty stub."""
    import torch

    operator = getattr(torch.ops._C, "static_scaled_fp8_quant", None)
    return operator is None or not operator.default._schema.arguments


def patch_attention(module: ModuleType) -> None:
    """Quantize keys and values on their way into the cache where a quantized cache is emulated."""
    from quantgate.formats.activations import fp8_cached

    original = module.Attention.forward

    def forward(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if (scales := getattr(self, EMULATED_KV_SCALES, None)) is not None:
            key, value = (
                fp8_cached(x, scale) for x, scale in zip((key, value), scales, strict=True)
            )
        return original(self, query, key, value, *args, **kwargs)

    module.Attention.forward = forward


def on_cpu(patch: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Return a patch that leaves its module alone where vLLM runs on anything but the CPU."""

    @functools.wraps(patch)
    def patch_on_cpu(module: ModuleType) -> None:
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            patch(module)

    return patch_on_cpu

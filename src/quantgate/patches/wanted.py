"""Which kernels an engine was asked for, how an emulated one is known, what this build lacks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
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


@functools.cache
def static_fp8_is_missing() -> bool:
    """Whether this build's operator for static FP8 quantization is an empty stub."""
    import torch

    operator = getattr(torch.ops._C, "static_scaled_fp8_quant", None)
    return operator is None or not operator.default._schema.arguments

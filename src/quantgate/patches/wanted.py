"""The kernels requested for an engine, the marks of emulated ones, and what this build lacks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

# The key in vLLM's `additional_config`, which is passed to every process of an engine.
ADDITIONAL_CONFIG_KEY = "quantgate"
PORTABLE = "portable"
NATIVE = "native"
# The attribute of an attention layer with the scales (k, v) of an emulated FP8 KV cache.
EMULATED_KV_SCALES = "quantgate_kv_scales"
# The attribute that marks an unquantized layer whose product is emulated.
EMULATED_LINEAR = "quantgate_float32_linear"


def is_emulated(kernel: object) -> bool:
    """Whether a vLLM kernel object computes in floating point on dequantized weights."""
    return bool(getattr(kernel, "emulated", False)) or type(kernel).__name__.startswith("Emulation")


def wanted() -> Mapping[str, Any]:
    """Return quantgate's settings of the engine that is loading."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    found: Mapping[str, Any] = ((config and config.additional_config) or {}).get(
        ADDITIONAL_CONFIG_KEY, {}
    )
    return found


def portable_wanted() -> bool:
    """Whether portable kernels are requested for the engine that is loading."""
    return bool(wanted().get("kernels", NATIVE) == PORTABLE)


@functools.cache
def static_fp8_is_missing() -> bool:
    """Whether this build's operator for static FP8 quantization is an empty stub."""
    import torch

    operator = getattr(torch.ops._C, "static_scaled_fp8_quant", None)
    return operator is None or not operator.default._schema.arguments

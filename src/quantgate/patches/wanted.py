"""The kernels requested for the engine that is loading, and what this build lacks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

# The key in vLLM's `additional_config`, which is passed to every process of an engine.
ADDITIONAL_CONFIG_KEY = "quantgate"
PORTABLE = "portable"
NATIVE = "native"


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

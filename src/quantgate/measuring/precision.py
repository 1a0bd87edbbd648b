"""Which dtype a checkpoint is measured in; "serving" is the one it is served in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantgate.formats.kernels import family_of
from quantgate.measuring import environment
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import actual_scheme, read_config
from quantgate.subject.processor import has_amx
from quantgate.subject.scheme import UNQUANTIZED

FLOAT32, SERVING = "float32", "serving"


def why_no_float32(checkpoint: Checkpoint) -> str | None:
    """Return why vLLM's kernels do not serve a checkpoint in float32; None if they do."""
    if actual_scheme(checkpoint.directory) == UNQUANTIZED:
        return None
    if "cpu" not in environment.available_devices():
        return "vLLM's CUDA kernels of quantized linears compute in 16 bits, not in float32"
    if checkpoint.engine.kernels == "native" and has_amx():
        config = read_config(checkpoint.directory).get("quantization_config") or {}
        groups = (config.get("config_groups") or {}).values()
        if any(_on_tiles(group) for group in groups if group.get("weights")):
            return "vLLM's kernels for AMX take this format's inputs in 16 bits, not in float32"
    return None


def _on_tiles(group: Mapping[str, Any]) -> bool:
    """Whether vLLM's CPU kernel with AMX serves it and takes 16-bit inputs only.

    `int8_scaled_mm_with_quant` for symmetric int8, `fp8_scaled_mm_cpu` for FP8 weights in blocks
    (vLLM 0.32.0, kernels/linear/scaled_mm/cpu.py).
    """
    family, inputs = family_of(group), group.get("input_activations") or {}
    if family == "int8":
        return bool(inputs.get("symmetric", True))
    return family == "fp8" and group["weights"].get("strategy") == "block"


def sharpest_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that resolves the smallest difference: float32, or the serving dtype."""
    return resolve_dtype(checkpoint, SERVING) if why_no_float32(checkpoint) else FLOAT32


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """Return the torch name of a dtype; "serving" is the one that the checkpoint is served in."""
    if dtype != SERVING:
        return dtype
    config = read_config(checkpoint.directory)
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"

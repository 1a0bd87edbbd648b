"""Which dtype a checkpoint is measured in; "serving" is the one it is served in."""

from __future__ import annotations

from quantgate.measuring import environment
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import actual_scheme, read_config
from quantgate.subject.scheme import UNQUANTIZED

FLOAT32, SERVING = "float32", "serving"


def has_float32(checkpoint: Checkpoint) -> bool:
    """Whether vLLM serves a checkpoint in float32: its CUDA kernels of quantized linears do not."""
    on_cpu = "cpu" in environment.available_devices()
    return on_cpu or actual_scheme(checkpoint.directory) == UNQUANTIZED


def sharpest_dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that resolves the smallest difference: float32, or the serving dtype."""
    return FLOAT32 if has_float32(checkpoint) else resolve_dtype(checkpoint, SERVING)


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """Return the torch name of a dtype; "serving" is the one that the checkpoint is served in."""
    if dtype != SERVING:
        return dtype
    config = read_config(checkpoint.directory)
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"

"""Assign GPUs to xdist workers: an equal share each, or one that several share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quantgate.errors import BadInput
from quantgate.subject.checkpoint import Checkpoint

VISIBLE = "CUDA_VISIBLE_DEVICES"
# In a worker's input: how many GPUs there are if several workers share one, and else 0.
SHARED_GPUS = "quantgate_shared_gpus"


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    Opens no CUDA context, because a worker selects its GPUs only afterwards.
    """
    if (visible := os.environ.get(VISIBLE)) is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def share(worker: int, workers: int, found: Sequence[str]) -> list[str]:
    """Return the GPUs of worker number `worker` (from 0) of `workers`; [] without GPUs.

    With fewer GPUs than workers, several share one (`require_fixed_cache`).
    """
    if not found:
        return []
    if each := len(found) // workers:
        return list(found[worker * each : (worker + 1) * each])
    return [found[worker % len(found)]]


def require_fixed_cache(checkpoint: Checkpoint, workers: int, gpus: int) -> None:
    """Raise `BadInput` if a checkpoint's engine would take all memory of a GPU that is shared."""
    if checkpoint.engine.kv_cache_memory_bytes is None:
        raise BadInput(
            f"{checkpoint.id}: with -n {workers} on {gpus} GPU(s) engines share one, and its "
            "engine would take all memory for its KV cache; give kv_cache_memory_bytes in "
            f"[engine] of its file, or -n {gpus} at most."
        )


def require_gpus(checkpoint_id: str, needed: int, owned: int, workers: int) -> None:
    """Raise `BadInput` if a worker owns fewer GPUs than a checkpoint's engine needs."""
    if needed > owned:
        raise BadInput(
            f"{checkpoint_id}: tensor_parallel_size={needed}, but with -n {workers} a worker owns "
            f"{owned} GPU(s); give a smaller -n."
        )

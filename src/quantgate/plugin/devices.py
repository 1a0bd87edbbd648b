"""Assign GPUs to xdist workers: an equal share each, none shared between two."""

from __future__ import annotations

import os
from collections.abc import Sequence

from quantgate.errors import BadInput

VISIBLE = "CUDA_VISIBLE_DEVICES"


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

    Raises `BadInput` if there are fewer GPUs than workers, because two engines would share one.
    """
    if not found:
        return []
    each = len(found) // workers
    if not each:
        raise BadInput(
            f"-n {workers}: only {len(found)} GPU(s) for {workers} workers, and no two engines "
            f"share one; give -n {len(found)} at most."
        )
    return list(found[worker * each : (worker + 1) * each])


def require_gpus(checkpoint_id: str, needed: int, owned: int, workers: int) -> None:
    """Raise `BadInput` if a worker owns fewer GPUs than a checkpoint's engine needs."""
    if needed > owned:
        raise BadInput(
            f"{checkpoint_id}: tensor_parallel_size={needed}, but with -n {workers} a worker owns "
            f"{owned} GPU(s); give a smaller -n."
        )

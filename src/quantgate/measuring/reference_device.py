"""The device that the reference computes on: its choice, and exact arithmetic on it.

On a CPU this module changes nothing about the computation.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantgate.errors import BadInput
from quantgate.measuring import environment

if TYPE_CHECKING:
    import torch

CPU, CUDA = "cpu", "cuda"
REFERENCE_DEVICES = (CPU, CUDA)
# How many tokens, in windows of equal length, go through a layer together on a GPU: enough to fill
# it. Attention's float32 scores are then at most 8,192 x heads x the windows' length.
TOKENS_PER_STEP = 8192


def choose_device(asked: str | None = None) -> str:
    """Return the device that was asked for; by default a GPU if there is one.

    Raises `BadInput` if a GPU was asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if asked == CUDA and not there:
        raise BadInput(
            "--reference-device cuda: torch sees no GPU here; leave the option out, or give cpu."
        )
    return asked or (CUDA if there else CPU)


def platform_of(device: str) -> str:
    """Return the device's name as a golden platform: "cpu", "sm90" …"""
    return environment.available_devices()[CUDA] if device == CUDA else device


def together(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return which windows of these lengths go through a layer together, by index.

    Windows of equal length need no padding, so the mask is the same as for a single one. On a CPU
    each goes alone: products with a different number of rows may round differently.
    """
    if device.type == CPU:
        return [[place] for place in range(len(lengths))]
    groups: list[list[int]] = []
    open_group: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        group = open_group.get(length)
        if group is None or (len(group) + 1) * length > TOKENS_PER_STEP:
            group = open_group[length] = []
            groups.append(group)
        group.append(place)
    return groups


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Compute without gradients and, on a GPU, without TF32.

    On a GPU attention is computed as product, softmax, product: the fused float32 kernels have
    their own arithmetic, which no torch setting controls. torch computes 16-bit inputs in float32
    there.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.inference_mode():
        if device.type == CPU:
            yield
        else:
            with _without_tf32(), sdpa_kernel(SDPBackend.MATH):
                yield


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Set torch's old and new TF32 settings alike: it raises on reading contradictory ones."""
    import torch

    products = torch.backends.cuda.matmul
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new setting was set
        precision = "highest"
    torch.set_float32_matmul_precision("highest")
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        products.fp32_precision, convolutions.fp32_precision = before


@contextmanager
def room_on(device: str) -> Iterator[None]:
    """Free what an engine left on a GPU and, on exit, what was allocated in the block.

    torch caches freed memory, and vLLM refuses to start if too little is free.
    """
    free_memory(device)
    try:
        yield
    finally:
        free_memory(device)


def free_memory(device: str) -> None:
    """Return unreferenced memory to the GPU; does nothing on a CPU."""
    import torch

    if device == CUDA:
        gc.collect()
        torch.cuda.empty_cache()

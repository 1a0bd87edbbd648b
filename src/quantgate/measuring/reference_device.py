"""The device that the reference computes on: which one it is, and exact arithmetic there.

On a CPU nothing here changes how anything is computed.
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
# Tokens of windows of one length that go through a layer together, but on a CPU: enough to fill a
# GPU. Attention's float32 scores are then at most 8,192 x heads x the windows' length.
TOKENS_PER_STEP = 8192


def choose_device(asked: str | None = None) -> str:
    """Return the device that was asked for; by default a GPU where there is one.

    Raises `BadInput` where a GPU was asked for and there is none.
    """
    import torch

    there = torch.cuda.is_available()
    if asked == CUDA and not there:
        raise BadInput(
            "--reference-device cuda: torch sees no GPU here; leave the option out, or give cpu."
        )
    return asked or (CUDA if there else CPU)


def platform_of(device: str) -> str:
    """Return what a golden's platform would be called: "cpu", "sm90" …"""
    return environment.available_devices()[CUDA] if device == CUDA else device


def together(lengths: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return which windows of these lengths go through a layer together, by their places.

    Windows of equal length need no padding, so their masks are those of one alone. On a CPU each
    goes alone: products of another number of rows may round otherwise.
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

    Attention is a softmax between two such products there: the fused kernels for float32 have an
    arithmetic of their own, which no setting of torch's describes. It takes 16-bit inputs in
    float32.
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
    """Set torch's old and new names for it alike: it refuses to read ones that contradict."""
    import torch

    products = torch.backends.cuda.matmul
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolutions.fp32_precision
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # somebody set the new name alone
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
    """Free what an engine left on a GPU, and afterwards what was allocated within.

    torch keeps freed memory for itself, and vLLM refuses to start where too little is free.
    """
    free_memory(device)
    try:
        yield
    finally:
        free_memory(device)


def free_memory(device: str) -> None:
    """Give a GPU's memory that nothing refers to any more back to it; nothing on a CPU."""
    import torch

    if device == CUDA:
        gc.collect()
        torch.cuda.empty_cache()

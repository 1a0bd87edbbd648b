"""Dequantize a linear layer's weight in float32 from a checkpoint's tensors.

`weights` is a config group's `weights` in `config.json`, unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantgate.formats.numbers import decode_e2m1, decode_e8m0, unpack_integers

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


def dequantize_weight(tensors: Tensors, weights: Mapping[str, Any]) -> torch.Tensor:
    """Return a module's dequantized weight, float32 [out, in].

    `tensors` are named as in the checkpoint, without the module's prefix: `weight` or
    `weight_packed`, `weight_scale`, and the format's other tensors. Value = (code - zero point) x
    scale, with the scale of the code's group; NVFP4's group scales are divided by its global scale.
    A `ValueError` names a tensor that is missing or has the wrong shape.
    """
    codes = _codes(tensors, weights)
    scale = _scale(tensors)
    zero_point = _zero_point(tensors, weights, codes, scale)
    if zero_point is not None:
        codes = codes - _spread(zero_point, codes, tensors, weights)
    return codes * _spread(scale, codes, tensors, weights)


def _codes(tensors: Tensors, weights: Mapping[str, Any]) -> torch.Tensor:
    import torch

    packed = tensors.get("weight_packed")
    if packed is None:
        return _needed(tensors, "weight").float()
    if packed.dtype == torch.uint8:
        return decode_e2m1(packed)
    rows, columns = (int(size) for size in _needed(tensors, "weight_shape"))
    codes = unpack_integers(packed, int(weights["num_bits"]), columns)
    if len(codes) != rows:
        raise ValueError(
            f"weight_shape says {rows} rows, but weight_packed has {len(codes)}; export the "
            "checkpoint again."
        )
    return codes.float()


def _scale(tensors: Tensors) -> torch.Tensor:
    import torch

    scale = _needed(tensors, "weight_scale")
    if scale.dtype == torch.uint8:
        return decode_e8m0(scale)
    global_scale = tensors.get("weight_global_scale")
    return scale.float() if global_scale is None else scale.float() / global_scale.float()


def _zero_point(
    tensors: Tensors, weights: Mapping[str, Any], codes: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor | None:
    import torch

    if weights.get("symmetric", True):
        return None
    stored = _needed(tensors, "weight_zero_point")
    if stored.dtype == torch.int32 and "weight_packed" in tensors:  # packed along the rows
        stored = unpack_integers(stored, int(weights["num_bits"]), len(codes), dim=0)
    if stored.shape != scale.shape:
        raise ValueError(
            f"weight_zero_point has shape {list(stored.shape)}, but weight_scale has "
            f"{list(scale.shape)}, and both must be the same; export the checkpoint again."
        )
    return stored.float()


def _spread(
    parameters: torch.Tensor, codes: torch.Tensor, tensors: Tensors, weights: Mapping[str, Any]
) -> torch.Tensor:
    """Return scales or zero points in a shape that broadcasts to the codes' [out, in]."""

    rows, columns = codes.shape
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return _shaped(parameters.reshape(-1), (1,), strategy)
    if strategy == "channel":
        return _shaped(parameters.reshape(len(parameters), -1), (rows, 1), strategy)
    if strategy == "block":
        height, width = weights["block_structure"]
        _shaped(parameters, (-(-rows // height), -(-columns // width)), strategy)
        wide = parameters.repeat_interleave(height, dim=0).repeat_interleave(width, dim=1)
        return wide[:rows, :columns]
    if strategy in ("group", "tensor_group"):
        size = int(weights["group_size"])
        _shaped(parameters, (rows, -(-columns // size)), strategy)
        return parameters[:, _groups_of_columns(tensors, columns, size, parameters.shape[1])]
    raise ValueError(f"weight strategy {strategy!r} is not one of the format's.")


def _groups_of_columns(tensors: Tensors, columns: int, size: int, groups: int) -> torch.Tensor:
    """Return the group of each column, int64: in order, or from act-order's `weight_g_idx`."""
    import torch

    given = tensors.get("weight_g_idx")
    if given is None or bool((given == -1).all()):  # -1 is how compressed-tensors writes "none"
        return torch.arange(columns, device=tensors["weight_scale"].device) // size
    if given.shape != (columns,) or not bool(((given >= 0) & (given < groups)).all()):
        raise ValueError(
            f"weight_g_idx must name one of {groups} groups for each of {columns} columns, got "
            f"{list(given.shape)} from {int(given.min())} to {int(given.max())}."
        )
    return given.long()


def _shaped(parameters: torch.Tensor, shape: tuple[int, ...], strategy: str) -> torch.Tensor:
    if tuple(parameters.shape) != shape:
        raise ValueError(
            f"strategy {strategy} needs scales of shape {list(shape)}, got "
            f"{list(parameters.shape)}."
        )
    return parameters


def _needed(tensors: Tensors, name: str) -> torch.Tensor:
    if name not in tensors:
        raise ValueError(f"the checkpoint has no {name} for this layer, only {sorted(tensors)}.")
    return tensors[name]

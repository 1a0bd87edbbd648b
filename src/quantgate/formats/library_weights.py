"""Weights dequantized by the compressed-tensors library, as a second opinion on our own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.formats.groups import Group, group_of
from quantgate.formats.stored import StoredTensors
from quantgate.formats.weights import Tensors, dequantize_weight
from quantgate.subject.files import read_config

if TYPE_CHECKING:
    import torch


def library_dequantize(tensors: Tensors, group: Group) -> torch.Tensor:
    """Return a module's weight, float32 [out, in], dequantized by compressed-tensors.

    The library computes in the dtype of the scales, so they are converted to float32 first. For
    NVFP4, MXFP4 and MXFP8 the format fixes the scales' dtype, and the library uses bfloat16.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    state = dict(tensors)
    if state["weight_scale"].is_floating_point() and "weight_global_scale" not in state:
        state["weight_scale"] = state["weight_scale"].float()
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs.model_validate(dict(group["weights"]))
    )
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    weight: torch.Tensor = compressor.decompress(state, scheme)["weight"]
    return weight.float()


def largest_disagreement(directory: Path) -> tuple[str, float]:
    """Return the linear on which our dequantizer and the library's differ most, and by how much.

    The difference is the largest of an element, relative to ours; NaN if either side has a NaN.
    """
    stored = StoredTensors(directory)
    quantization = read_config(directory).get("quantization_config")
    worst = ("no quantized linear", 0.0)
    for name in stored.modules:
        group = group_of(name, "Linear", quantization)
        if group is None or "weight_scale" not in stored.parts_of(name):
            continue
        tensors = stored.of_module(name)
        relative = _largest_relative(
            dequantize_weight(tensors, group["weights"]), library_dequantize(tensors, group)
        )
        if not relative <= worst[1]:
            worst = (name, relative)
    return worst


def _largest_relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.equal(theirs):
        return 0.0
    return float(((theirs - ours).abs() / ours.abs().clamp(min=2.0**-126)).max())

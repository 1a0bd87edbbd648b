"""Quantize a linear layer's input as vLLM does, and dequantize it again.

compressed-tensors' rules differ from vLLM's: it uses 127.5 as int8's largest code, and divides by
an FP8 scale where vLLM's CPU builds multiply by its reciprocal. These functions agree bit for bit
with vLLM 0.32.0's CPU code. Where builds differ, the rule is that of the installed one (`builds`).
All take x [rows, H] in any floating dtype and return float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantgate.formats.builds import fp8_rule, int8_rule, symmetric_rule
from quantgate.formats.numbers import E4M3_HIGHEST, to_e4m3

if TYPE_CHECKING:
    import torch

INT8_LOWEST, INT8_HIGHEST = -128, 127
E2M1_HIGHEST = 6.0
# The smallest scale of a dynamic FP8 input (vLLM's `_FP8_MIN_SCALING_FACTOR`).
FP8_SMALLEST_SCALE = 1.0 / (E4M3_HIGHEST * 512.0)
NVFP4_GROUP = 16


def int8_per_token(x: torch.Tensor, *, symmetric: bool) -> torch.Tensor:
    """Dynamic int8, one scale per row: amax / 127, or (max - min) / 255 with a zero point."""
    x = x.float()
    if symmetric:
        largest = x.abs().amax(dim=1, keepdim=True)
        return _values(symmetric_rule().dynamic(x, largest), _quotient(largest, INT8_HIGHEST))
    lowest = x.amin(dim=1, keepdim=True)
    scale = _quotient(x.amax(dim=1, keepdim=True) - lowest, INT8_HIGHEST - INT8_LOWEST)
    zero_point = (INT8_LOWEST - lowest / scale).round()
    return _values(int8_rule()(x, scale, zero_point), scale, zero_point)


def int8_per_tensor(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Static int8: the checkpoint's per-tensor scale and, for asymmetric inputs, zero point."""
    x, scale = x.float(), scale.float()
    if zero_point is None:
        return _values(symmetric_rule().static(x, scale), scale)
    zero_point = zero_point.float()
    return _values(int8_rule()(x, scale, zero_point), scale, zero_point)


def _quotient(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """Return x / divisor, rounded once: on CUDA torch multiplies by the reciprocal of a number."""
    return x / x.new_tensor(divisor)


def _values(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantize int8 codes, clamped first. A row of zeros, whose scale is 0, stays zero."""
    codes = codes.clamp(INT8_LOWEST, INT8_HIGHEST)
    return ((codes if zero_point is None else codes - zero_point) * scale).where(scale != 0, 0.0)


def fp8_per_token(x: torch.Tensor) -> torch.Tensor:
    """Dynamic FP8 (E4M3), one scale per row: amax / 448, with a lower bound."""
    x = x.float()
    scale = fp8_scale_per_token(x)
    return _e4m3(fp8_rule()(x, scale)) * scale


def fp8_scale_per_token(x: torch.Tensor) -> torch.Tensor:
    """Return the scales [rows, 1] of `fp8_per_token`."""
    largest = x.abs().amax(dim=1, keepdim=True)
    return _quotient(largest, E4M3_HIGHEST).clamp(min=FP8_SMALLEST_SCALE)


def fp8_per_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Static FP8 (E4M3): the checkpoint's per-tensor scale."""
    scale = scale.float()
    return _e4m3(x.float() * scale.reciprocal()) * scale


def fp8_per_group(x: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """Dynamic FP8 (E4M3), one scale per `group_size` columns of a row, for FP8_BLOCK weights.

    Here vLLM divides by the scale. The last group may be shorter.
    """
    import torch

    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % group_size))
    groups = padded.view(rows, -1, group_size)
    scale = _quotient(groups.abs().amax(dim=2, keepdim=True), E4M3_HIGHEST)
    scale = scale.clamp(min=FP8_SMALLEST_SCALE)
    return (_e4m3(groups / scale) * scale).view(rows, -1)[:, :columns]


def _e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round to E4M3, saturating, and back."""
    return to_e4m3(x).float()


def nvfp4(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    """NVFP4: E2M1 codes, one E4M3 scale per 16 columns, divided by the checkpoint's global scale.

    Group scale = e4m3(min(448, global x amax / 6)).
    """

    rows, columns = x.shape
    if columns % NVFP4_GROUP:
        raise ValueError(f"NVFP4 needs a multiple of {NVFP4_GROUP} columns, got {columns}.")
    global_scale = global_scale.float()
    groups = x.float().view(rows, -1, NVFP4_GROUP)
    amax = groups.abs().amax(dim=2, keepdim=True)
    scale = _e4m3(global_scale * (amax * (1.0 / E2M1_HIGHEST)))
    back = _reciprocal_or_zero(scale * _reciprocal_or_zero(global_scale))
    scaled = (groups * back).clamp(-E2M1_HIGHEST, E2M1_HIGHEST)
    return (_e2m1(scaled) * (scale / global_scale)).view(rows, columns)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to E2M1's 0, 0.5, 1, 1.5, 2, 3, 4 and 6, which are evenly spaced between powers of two.

    Ties round to the even mantissa, i.e. to the even multiple of the step. x is within ±6.
    """
    magnitude = x.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return (x / step).round() * step


def _reciprocal_or_zero(x: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(x == 0, torch.zeros_like(x), x.reciprocal())


def fp8_cached(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return x as read from an FP8 (E4M3) KV cache, in x's dtype; vLLM divides by the scale."""
    return (_e4m3(_quotient(x.float(), scale)) * scale).to(x.dtype)

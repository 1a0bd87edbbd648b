"""Quantized weights as float32, some rows at a time, with NumPy; and rounding to nearest.

Value = (code - zero point) × scale of the code's group; NVFP4's group scales are divided by its
global scale. Packed integer codes are stored with an offset of 2^(bits - 1), the first in a word's
lowest bits. `formats/weights.py` has the same definitions in torch, for whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantgate.audit.decode import E2M1, Floats, decode, read_floats
from quantgate.audit.headers import Entry
from quantgate.audit.layout import MXFP4, MXFP8, NVFP4, Layout, format_of
from quantgate.audit.quantization import Args, Group

FP4_MAX, FP8_MAX = 6.0, 448.0
FP4_MANTISSA, FP8_MANTISSA = 1, 3
FP4_EXPONENT, FP8_EXPONENT = 0, -6
MX_ROUNDS_UP = 1.75
TINY = np.float32(1e-30)


@dataclass(frozen=True)
class StoredWeight:
    """A weight [rows, columns] on disk, quantized or not, read some rows at a time."""

    rows: int
    columns: int
    read: Callable[[int, int], Floats]
    """From first and last row, exclusive, to float32 [last - first, columns]."""


def whole_weight(entry: Entry) -> StoredWeight:
    """Return a weight stored as floats; one-dimensional tensors become one column."""
    columns = int(np.prod(entry.shape[1:]))

    def read(first: int, last: int) -> Floats:
        return decode(entry.rows(first, last), entry.dtype).reshape(-1, columns)

    return StoredWeight(entry.shape[0] if entry.shape else 1, columns, read)


def quantized_weight(parts: Mapping[str, Entry], group: Group, layout: Layout) -> StoredWeight:
    """Return a quantized weight; its tensors must have the dtypes and shapes of its layout."""
    args = _weights(group)
    codes = _codes(parts, args, layout.columns)
    scale = _scale(parts, group)
    zero = _zero_point(parts, args, scale.shape, layout.rows)
    spread = _spread(args, parts, layout)

    def read(first: int, last: int) -> Floats:
        values = codes(first, last)
        if zero is not None:
            values -= spread(zero, first, last)
        values *= spread(scale, first, last)
        return values

    return StoredWeight(layout.rows, layout.columns, read)


def _weights(group: Group) -> Args:
    if group.weights is None:
        raise ValueError(f"{group.name} quantizes no weights")
    return group.weights


def _codes(parts: Mapping[str, Entry], args: Args, columns: int) -> Callable[[int, int], Floats]:
    packed = parts.get("weight_packed")
    if packed is None:
        return whole_weight(parts["weight"]).read
    if packed.dtype == "U8":
        return lambda first, last: _halves(packed.rows(first, last)).reshape(last - first, -1)
    return lambda first, last: unpacked(
        packed.rows(first, last).view("<u4").reshape(last - first, -1), args.bits
    )[:, :columns].astype(np.float32)


def _halves(raw: NDArray[np.uint8]) -> Floats:
    return E2M1[np.stack([raw & 15, raw >> 4], axis=-1).reshape(-1)]


def unpacked(words: NDArray[np.uint32], bits: int) -> NDArray[np.int32]:
    """Return the signed codes [rows, codes] of words [rows, words], 32 // bits codes per word."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(words), -1).astype(np.int32) - (1 << (bits - 1))


def _scale(parts: Mapping[str, Entry], group: Group) -> Floats:
    entry = parts["weight_scale"]
    dtype = "F8_E8M0" if entry.dtype == "U8" else entry.dtype
    scale = decode(entry.bytes(), dtype).reshape(entry.shape)
    if format_of(group) == NVFP4:
        scale = scale / read_floats(parts["weight_global_scale"]).reshape(-1)[0]
    return scale


def _zero_point(
    parts: Mapping[str, Entry], args: Args, shape: tuple[int, ...], rows: int
) -> Floats | None:
    entry = parts.get("weight_zero_point")
    if args.symmetric or entry is None:
        return None
    if entry.dtype != "I32" or entry.shape == shape:
        return read_floats(entry).reshape(shape)
    words = entry.bytes().view("<u4").reshape(entry.shape)
    return unpacked(words.T.copy(), args.bits).T[:rows].astype(np.float32)


def _spread(
    args: Args, parts: Mapping[str, Entry], layout: Layout
) -> Callable[[Floats, int, int], Floats]:
    """Return a function giving some rows' scales or zero points, broadcastable to their codes."""
    if args.strategy == "tensor":
        return lambda values, _first, _last: values.reshape(1, 1)
    if args.strategy == "channel":
        return lambda values, first, last: values.reshape(-1, 1)[first:last]
    if args.strategy == "block" and args.block:
        height, width = args.block
        columns_of = np.arange(layout.columns) // width
        return lambda values, first, last: values[
            (np.arange(first, last) // height)[:, None], columns_of
        ]
    groups = column_groups(args, parts, layout.columns)
    return lambda values, first, last: values[first:last][:, groups]


def column_groups(args: Args, parts: Mapping[str, Entry], columns: int) -> NDArray[np.int64]:
    """Return the group of each column: consecutive, or given by act-order's `weight_g_idx`."""
    size = args.group_size or columns
    entry = parts.get("weight_g_idx")
    if entry is not None:
        given = read_floats(entry).reshape(-1).astype(np.int64)
        if len(given) == columns and given.min() >= 0 and given.max() * size < columns:
            return given
    return np.arange(columns, dtype=np.int64) // size


# --- rounding to nearest -------------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """Rounds weights to nearest in a group's format, computing scales afresh."""

    group: Group
    parts: Mapping[str, Entry]
    columns: int
    amax: float
    """The largest weight of the whole tensor, for formats with a tensor-wide scale."""
    scales_as_stored: bool = False
    """Whether scales are rounded to their stored dtype before codes are computed."""

    def __call__(self, weight: Floats) -> Floats:
        """Round some rows [rows, columns], which must be whole blocks of rows."""
        args = _weights(self.group)
        rows = len(weight)
        if args.strategy == "tensor":
            return self._round(weight.reshape(1, -1), self.amax).reshape(weight.shape)
        if args.strategy == "channel":
            return self._round(weight)
        if args.strategy == "block" and args.block:
            return self._blocks(weight, *args.block)
        groups = column_groups(args, self.parts, self.columns)
        order = np.argsort(groups, kind="stable")
        size = args.group_size or self.columns
        padded = np.zeros((rows, -(-self.columns // size) * size), np.float32)
        padded[:, : self.columns] = weight[:, order]
        rounded = self._round(padded.reshape(-1, size)).reshape(rows, -1)[:, : self.columns]
        result = np.empty_like(weight)
        result[:, order] = rounded
        return result

    def _blocks(self, weight: Floats, height: int, width: int) -> Floats:
        rows, columns = weight.shape
        tall, wide = -(-rows // height), -(-columns // width)
        padded = np.zeros((tall * height, wide * width), np.float32)
        padded[:rows, :columns] = weight
        blocks = padded.reshape(tall, height, wide, width).swapaxes(1, 2)
        rounded = self._round(blocks.reshape(tall * wide, -1)).reshape(blocks.shape)
        whole: Floats = rounded.swapaxes(1, 2).reshape(padded.shape)[:rows, :columns]
        return whole

    def _round(self, weight: Floats, amax: float | None = None) -> Floats:
        """Round weights [scales, weights per scale]."""
        args = _weights(self.group)
        largest = np.maximum(
            np.abs(weight).max(axis=1, keepdims=True) if amax is None else np.float32(amax), TINY
        )
        stored = rounding_to(self.parts["weight_scale"].dtype if self.scales_as_stored else "F32")
        if args.kind == "int":
            return _round_integers(weight, args, None if amax is None else float(amax), stored)
        most = FP4_MAX if args.bits == 4 else FP8_MAX
        scale = largest / np.float32(most)
        form = format_of(self.group)
        if form == NVFP4:
            divisor = read_floats(self.parts["weight_global_scale"]).reshape(-1)[0]
            scale = to_float(scale * divisor, FP8_MANTISSA, FP8_EXPONENT, FP8_MAX) / divisor
        elif form in (MXFP4, MXFP8):
            # A largest weight above 1.75 times its power of two takes the next power.
            exponent = np.floor(np.log2(largest / np.float32(MX_ROUNDS_UP))) + 1
            scale = np.exp2(exponent - np.floor(np.log2(most))).astype(np.float32)
        scale = np.maximum(stored(scale), TINY)
        mantissa, least = (
            (FP4_MANTISSA, FP4_EXPONENT) if args.bits == 4 else (FP8_MANTISSA, FP8_EXPONENT)
        )
        rounded: Floats = to_float(weight / scale, mantissa, least, most) * scale
        return rounded


def _round_integers(
    weight: Floats, args: Args, amax: float | None, stored: Callable[[Floats], Floats]
) -> Floats:
    low, high = -(2 ** (args.bits - 1)), 2 ** (args.bits - 1) - 1
    if args.symmetric:
        largest = np.abs(weight).max(axis=1, keepdims=True) if amax is None else np.float32(amax)
        scale = np.maximum(stored(np.asarray(largest / np.float32((high - low) / 2))), TINY)
        codes = np.clip(np.rint(weight / scale), low, high)
        return np.asarray(codes * scale, np.float32)
    least = np.minimum(weight.min(axis=1, keepdims=True), 0)
    most = np.maximum(weight.max(axis=1, keepdims=True), 0)
    scale = np.maximum(stored((most - least) / np.float32(high - low)), TINY)
    zero = np.clip(np.rint(low - least / scale), low, high)
    rounded = np.clip(np.rint(weight / scale) + zero, low, high) - zero
    return np.asarray(rounded * scale, np.float32)


def rounding_to(dtype: str) -> Callable[[Floats], Floats]:
    """Return a function that rounds float32 to a dtype of unquantized weights."""
    if dtype == "F16":
        return lambda values: values.astype(np.float16).astype(np.float32)
    return _to_bfloat16 if dtype == "BF16" else lambda values: values


def _to_bfloat16(values: Floats) -> Floats:
    bits = np.ascontiguousarray(values).view(np.uint32)
    even = (bits >> 16) & 1
    return ((bits + 0x7FFF + even) & np.uint32(0xFFFF0000)).view(np.float32)


def to_float(values: Floats, mantissa: int, least: int, most: float) -> Floats:
    """Round to low-bit floats, to nearest with ties to even; larger values are clamped to `most`.

    `mantissa` counts stored bits, `least` is the exponent below which numbers are subnormal.
    """
    exponents = np.maximum(np.frexp(values)[1] - 1, least)
    step = np.exp2((exponents - mantissa).astype(np.float32))
    return np.asarray(np.clip(np.rint(values / step) * step, -most, most), np.float32)

"""The bytes of stored tensors as float32, with NumPy alone.

E4M3 and E5M2 are OCP's (FP8 formats, 1.0), E8M0 and E2M1 those of Microscaling (1.0).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantgate.audit.headers import CHUNK, DTYPES, Entry, Raw
from quantgate.formats.numbers import E2M1_MAGNITUDES, E8M0_NAN

Floats = NDArray[np.float32]

# Elements sampled from each chunk for a median.
SAMPLE = 4096


def _e4m3(code: int) -> float:
    sign, exponent, mantissa = 1 - (code >> 7) * 2, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa * 2.0**-9)
    return float(sign * (8 + mantissa) * 2.0 ** (exponent - 10))


def _e4m3fnuz(code: int) -> float:
    """Half of OCP's value, for a bias of 8; only the code of -0 is NaN."""
    if code == 0x80:
        return float("nan")
    return _e4m3(code & 0x7F) / 2 * (1 - (code >> 7) * 2) if code & 0x7F != 0x7F else 240.0


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)
E4M3FNUZ = np.array([_e4m3fnuz(code) for code in range(256)], np.float32)
E8M0 = np.array([np.nan if e == E8M0_NAN else 2.0 ** (e - 127) for e in range(256)], np.float32)
E2M1 = np.array([*E2M1_MAGNITUDES, *(-value for value in E2M1_MAGNITUDES)], np.float32)
TABLES = {"F8_E4M3": E4M3, "F8_E4M3FNUZ": E4M3FNUZ, "F8_E8M0": E8M0}
VIEWS = {
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}
# Unsigned views of floats, and the first non-finite code. Codes of positive floats sort like their
# values, so the smallest and the largest code tell whether all are finite.
POSITIVE = {
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E8M0": ("u1", 0xFF),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF << 52),
}


def decode(raw: Raw, dtype: str) -> Floats:
    """Return a tensor's bytes as flat float32; raise `ValueError` for an unsupported dtype."""
    if dtype in TABLES:
        return TABLES[dtype][raw]
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E5M2":
        return (raw.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    if dtype not in VIEWS:
        raise ValueError(f"{dtype} is not decoded")
    with np.errstate(over="ignore"):
        return raw.view(VIEWS[dtype]).astype(np.float32)


def read_floats(entry: Entry) -> Floats:
    """Return a small tensor as float32, in its stored shape."""
    return decode(entry.bytes(), entry.dtype).reshape(entry.shape)


@dataclass(frozen=True)
class Spread:
    """Statistics of a scale tensor; smallest, median and largest cover only finite values."""

    count: int
    not_finite: int
    negative: int
    zero: int
    smallest: float
    median: float
    largest: float
    digest: bytes
    """A digest of codes sampled across the tensor: equal digests make a full compare worthwhile."""


def spread_of(entry: Entry, dtype: str) -> Spread:
    """Read a scale tensor whose dtype is in `POSITIVE`, a chunk at a time."""
    view, limit = POSITIVE[dtype]
    zero_is_valid = dtype == "F8_E8M0"
    sample: list[Raw] = []
    bad = np.zeros(3, np.int64)
    extremes: list[float] = []
    for raw in entry.chunks(CHUNK):
        codes = raw.view(view)
        low, high = codes.min(), codes.max()
        sample.append(codes[:: max(1, len(codes) // SAMPLE)].copy())
        if high < limit and (low > 0 or zero_is_valid):
            ends = np.array([low, high], codes.dtype)
            extremes += decode(ends.view(np.uint8), dtype).tolist()
            continue
        values = decode(raw, dtype)
        finite = values[np.isfinite(values)]
        bad += (len(values) - len(finite), int((finite < 0).sum()), int((finite == 0).sum()))
        if len(finite):
            extremes += [float(finite.min()), float(finite.max())]
    codes = np.concatenate(sample) if sample else np.zeros(0, view)
    values = decode(codes.view(np.uint8), dtype)
    values = values[np.isfinite(values)]
    return Spread(
        entry.count,
        int(bad[0]),
        int(bad[1]),
        int(bad[2]),
        min(extremes, default=0.0),
        float(np.median(values)) if len(values) else 0.0,
        max(extremes, default=0.0),
        hashlib.blake2b(codes.tobytes(), digest_size=8).digest(),
    )


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors hold the same bytes, without holding either in memory."""
    return one.size == other.size and all(np.array_equal(a, b) for a, b in _together(one, other))


def _together(one: Entry, other: Entry) -> Iterator[tuple[Raw, Raw]]:
    return zip(one.chunks(), other.chunks(), strict=True)


def is_float(dtype: str) -> bool:
    """Whether unquantized weights are stored in a dtype."""
    return dtype in ("F16", "BF16", "F32", "F64") and DTYPES[dtype] >= 16

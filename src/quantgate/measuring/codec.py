"""Converts a measurement to the named arrays of a cache entry, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from quantgate.measuring.measurement import Measurement, Provenance


def to_arrays(measured: Measurement) -> dict[str, NDArray[Any]]:
    """Return a measurement's arrays by field name, its provenance as the bytes of JSON."""
    held = ((field.name, getattr(measured, field.name)) for field in fields(measured))
    arrays = {name: value for name, value in held if isinstance(value, np.ndarray)}
    if measured.hidden is not None:
        arrays["hidden"] = packed(measured.hidden)
    provenance = msgspec.json.encode(measured.provenance)
    return {**arrays, "provenance": np.frombuffer(provenance, np.uint8)}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Measurement:
    """Invert `to_arrays`, bit for bit."""
    provenance = msgspec.convert(json.loads(arrays["provenance"].tobytes()), Provenance)
    found: dict[str, Any] = {**arrays, "provenance": provenance}
    if "hidden" in found:
        found["hidden"] = unpacked(found["hidden"])
    return Measurement(**found)


def packed(hidden: NDArray[Any]) -> NDArray[Any]:
    """Return hidden states in 16 bits if they fit there without rounding."""
    bits = np.ascontiguousarray(hidden).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16)  # bfloat16, for which NumPy has no dtype
    with np.errstate(over="ignore"):
        half = hidden.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), hidden) else hidden


def unpacked(stored: NDArray[Any]) -> NDArray[Any]:
    """Invert `packed`."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)

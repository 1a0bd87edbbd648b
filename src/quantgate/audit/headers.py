"""The headers of safetensors files, read without trusting a number in them.

A file is eight bytes with the header's length, the header as JSON, then the tensors' bytes, without
gaps. No allocation depends on a size that a header claims.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]

# The limit of safetensors' own reader.
LONGEST_HEADER = 100_000_000
LONGEST_JSON = 200_000_000
MOST_DIMENSIONS = 8
CHUNK = 1 << 22
# Bits per element.
DTYPES = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


class Problem(NamedTuple):
    """A reason why a file or a part of it cannot be read."""

    name: str
    value: str
    expected: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file; its bytes are known to exist."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    """Offset of the first byte in the file."""
    size: int
    """In bytes."""

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def chunks(self, size: int = CHUNK) -> Iterator[Raw]:
        """Yield the tensor's bytes in order, at most `size` of them at a time.

        They are valid until the next ones are asked for: one buffer holds them all in turn.
        """
        buffer = np.empty(min(size, self.size), np.uint8)
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            for place in range(0, self.size, size):
                raw = buffer[: self.size - place]
                if stream.readinto(raw.data) != len(raw):
                    raise OSError(f"{self.file} was cut while it was read")
                yield raw

    def rows(self, first: int, last: int) -> Raw:
        """Return the bytes of rows `first` to `last`, exclusive, of the first dimension."""
        width = self.size // self.shape[0] if self.shape and self.shape[0] else self.size
        with self.file.open("rb") as stream:
            stream.seek(self.begin + first * width)
            return np.frombuffer(stream.read((last - first) * width), np.uint8)

    def bytes(self) -> Raw:
        """Return all bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            return np.frombuffer(stream.read(self.size), np.uint8)


class Shard(NamedTuple):
    """A safetensors file: its readable tensors and its problems."""

    path: Path
    entries: dict[str, Entry]
    twice: tuple[str, ...]
    """Names that its header holds more than once."""
    problems: tuple[Problem, ...]


def read_shard(path: Path) -> Shard:
    """Read a safetensors file's header; errors become problems."""
    try:
        header, twice, data = _header(path)
    except (OSError, ValueError, RecursionError) as error:
        problem = Problem(path.name, _reason(error), "a whole safetensors file")
        return Shard(path, {}, (), (problem,))
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    end = path.stat().st_size
    for name, said in header.items():
        if name == "__metadata__":
            continue
        try:
            entries[name] = _entry(said, path, data, end)
        except ValueError as error:
            problems.append(Problem(name, str(error), "dtype, shape and offsets that fit the file"))
    if not problems:
        problems += _gaps(path, entries, data, end)
    return Shard(path, entries, twice, tuple(problems))


def _header(path: Path) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """Return a header, its duplicate names, and where the tensors' bytes begin."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is not a regular file")
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size < 8:
            raise ValueError(f"has {size} bytes, too few for the header's length")
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"says that its header has {length} bytes; the file has {size}")
        raw = stream.read(length)
    twice: list[str] = []
    header = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _unique(pairs, twice))
    if not isinstance(header, dict):
        raise ValueError("has a header that is not an object")
    return header, tuple(twice), 8 + length


def _unique(pairs: list[tuple[str, Any]], twice: list[str]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                twice.append(name)
            seen.add(name)
    return unique


def _entry(said: Any, path: Path, data: int, end: int) -> Entry:
    if not isinstance(said, dict):
        raise ValueError("is not described by an object")
    dtype, shape, offsets = (said.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has the dtype {dtype!r}, which safetensors does not know")
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"has the shape {shape!r}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has the offsets {offsets!r}")
    first, last = offsets
    if data + last > end:
        raise ValueError(f"ends at byte {data + last} of a file of {end}: it is truncated")
    if math.prod(shape) * DTYPES[dtype] != (last - first) * 8:
        raise ValueError(f"is {dtype} {list(shape)} in {last - first} bytes")
    return Entry(dtype, tuple(shape), path, data + first, last - first)


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _gaps(path: Path, entries: dict[str, Entry], data: int, end: int) -> Iterator[Problem]:
    """Yield where tensors overlap, or leave bytes that belong to no tensor."""
    place = data
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].size)):
        if entry.begin < place:
            yield Problem(name, f"overlaps the tensor before it by {place - entry.begin} bytes", "")
        elif entry.begin > place:
            yield Problem(name, f"begins {entry.begin - place} bytes after the one before it", "")
        place = max(place, entry.begin + entry.size)
    if place != end:
        yield Problem(path.name, f"has {end - place} bytes after its last tensor", "")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raise `ValueError` with a short reason if unreadable."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_size > LONGEST_JSON:
            raise ValueError(f"has {status.st_size} bytes")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"is not JSON ({error})"
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)

"""A copy of a checkpoint that a test damages: tensors are bytes, so any dtype can be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantgate.audit.decode import Floats, decode
from quantgate.audit.headers import Raw, read_shard

WEIGHTS = "model.safetensors"


@dataclass
class Tensor:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    raw: Raw

    @property
    def floats(self) -> Floats:
        """Its values as float32, flat."""
        return decode(self.raw, self.dtype)

    def times(self, factor: float) -> Tensor:
        """Return it multiplied; for F32 and BF16."""
        return self.with_values(self.floats * np.float32(factor))

    def with_values(self, values: Floats) -> Tensor:
        """Return it with other values; for F32 and BF16."""
        values = np.ascontiguousarray(values, "<f4").reshape(-1)
        if self.dtype == "F32":
            return Tensor("F32", self.shape, values.view(np.uint8))
        assert self.dtype == "BF16"
        bits = values.view("<u4")
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return Tensor("BF16", self.shape, rounded.view(np.uint8))

    def with_value(self, place: int, value: float) -> Tensor:
        """Return it with one value replaced."""
        values = self.floats.copy()
        values[place] = value
        return self.with_values(values)


class RawCheckpoint:
    """A checkpoint of one file, copied to be changed; `write` puts the tensors back."""

    def __init__(self, source: Path, directory: Path) -> None:
        self.directory = directory
        shutil.copytree(source, directory)
        entries = read_shard(directory / WEIGHTS).entries
        self.tensors = {n: Tensor(e.dtype, e.shape, e.bytes()) for n, e in entries.items()}

    def write(self) -> None:
        """Write the tensors."""
        write_safetensors(self.directory / WEIGHTS, self.tensors)

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file's object; one that is not there begins as {}."""
        path = self.directory / name
        document = json.loads(path.read_text()) if path.exists() else {}
        change(document)
        path.write_text(json.dumps(document))

    def config(self, **keys: Any) -> None:
        """Set keys of config.json."""
        self.edit("config.json", lambda config: config.update(keys))

    def quantization(self, **keys: Any) -> None:
        """Set keys of the quantization_config."""
        self.edit("config.json", lambda config: config["quantization_config"].update(keys))

    def group(self, **keys: Any) -> None:
        """Set keys of the first config group."""
        self.edit(
            "config.json",
            lambda config: config["quantization_config"]["config_groups"]["group_0"].update(keys),
        )

    def rename(self, old: str, new: str) -> None:
        """Give every tensor whose name begins with `old` another beginning."""
        self.tensors = {
            new + name.removeprefix(old) if name.startswith(old) else name: tensor
            for name, tensor in self.tensors.items()
        }

    def exchange(self, one: str, other: str) -> None:
        """Exchange all tensors of two modules."""
        self.rename(f"{one}.", "aside.")
        self.rename(f"{other}.", f"{one}.")
        self.rename("aside.", f"{other}.")

    def drop(self, *names: str) -> None:
        """Remove tensors."""
        for name in names:
            del self.tensors[name]


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        size = len(tensor.raw)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    raw = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors.values():
            stream.write(tensor.raw.tobytes())

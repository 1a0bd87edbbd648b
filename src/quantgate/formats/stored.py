"""The tensors of a checkpoint's safetensors files, read one at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.checkpoint import BadInput, weight_files

if TYPE_CHECKING:
    import torch


class StoredTensors:
    """Finds tensors by name over all of a checkpoint's files; nothing stays in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of = _files_of_tensors(directory)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._file_of)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all modules that have tensors of their own."""
        return tuple(self._parts)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; `BadInput` where the checkpoint has none of that name."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise BadInput(f"{self.directory}: there is no tensor '{name}' in its weights.")
        with safe_open(self._file_of[name], framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
            return tensor

    def of_module(self, name: str) -> dict[str, torch.Tensor]:
        """Return a module's own tensors, named without its prefix; {} where it has none."""
        return {part: self.read(f"{name}.{part}") for part in self.parts_of(name)}

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Return the names of a module's own tensors, without its prefix."""
        return self._parts.get(name, ())

    @functools.cached_property
    def _parts(self) -> dict[str, tuple[str, ...]]:
        parts: dict[str, tuple[str, ...]] = {}
        for full in self._file_of:
            module, _, part = full.rpartition(".")
            parts[module] = (*parts.get(module, ()), part)
        return parts


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as stream:
            found.update(dict.fromkeys(stream.keys(), path))
    return found

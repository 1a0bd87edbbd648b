"""The tensors of a checkpoint's safetensors files, read one at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantgate.errors import BadInput
from quantgate.subject.files import weight_files

if TYPE_CHECKING:
    import torch


PAGE = 4096


class TensorsByName(Protocol):
    """A checkpoint's tensors by name, on disk or in memory."""

    @property
    def directory(self) -> Path:
        """The checkpoint's directory."""

    def __contains__(self, name: str) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; `BadInput` if the checkpoint has none of that name."""

    def of_module(self, name: str) -> dict[str, torch.Tensor]:
        """Return a module's own tensors, named without its prefix; {} if it has none."""


class StoredTensors:
    """A checkpoint's tensors by name, over all of its files; nothing stays in memory."""

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
        """The names of all modules with tensors of their own."""
        return tuple(self._parts)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor; `BadInput` if the checkpoint has none of that name."""
        from safetensors import safe_open

        if name not in self._file_of:
            raise BadInput(f"{self.directory}: there is no tensor '{name}' in its weights.")
        with safe_open(self._file_of[name], framework="pt") as stream:
            tensor: torch.Tensor = stream.get_tensor(name)
            return tensor

    def shape(self, name: str) -> list[int]:
        """Return a tensor's shape, without reading it."""
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as stream:
            shape: list[int] = stream.get_slice(name).get_shape()
            return shape

    def in_memory(self, modules: Iterable[str], *, pinned: bool) -> dict[str, torch.Tensor]:
        """Return the tensors of some modules, read from disk to the last byte.

        `read` maps a file and leaves its bytes on disk until they are used. `pinned` copies them to
        pinned memory, from which a GPU can copy asynchronously.
        """
        names = (f"{module}.{part}" for module in modules for part in self.parts_of(module))
        tensors = {name: self.read(name) for name in names}
        for name, tensor in tensors.items():
            if pinned:
                tensors[name] = tensor.pin_memory()
            else:
                _touch(tensor)
        return tensors

    def of_module(self, name: str) -> dict[str, torch.Tensor]:
        """Return a module's own tensors, named without its prefix; {} if it has none."""
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


@dataclass(frozen=True)
class LoadedTensors:
    """A checkpoint's tensors on a device, some of them read from disk in advance."""

    stored: StoredTensors
    device: torch.device
    ahead: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The tensors read in advance, by full name, on the CPU."""

    @property
    def directory(self) -> Path:
        """The checkpoint's directory."""
        return self.stored.directory

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the device; `BadInput` if the checkpoint has none of that name.

        A copy from pinned memory may still be in progress; the device's next work waits for it.
        """
        tensor = self.ahead[name] if name in self.ahead else self.stored.read(name)
        return tensor.to(self.device, non_blocking=True)

    def of_module(self, name: str) -> dict[str, torch.Tensor]:
        """Return a module's own tensors, named without its prefix; {} if it has none."""
        return {part: self.read(f"{name}.{part}") for part in self.stored.parts_of(name)}


def _touch(tensor: torch.Tensor) -> None:
    """Read every page of a mapped tensor; NumPy starts no threads for this."""
    import torch

    tensor.reshape(-1).view(torch.uint8).numpy()[::PAGE].max(initial=0)


def _files_of_tensors(directory: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in weight_files(directory):
        with safe_open(path, framework="pt") as stream:
            found.update(dict.fromkeys(stream.keys(), path))
    return found

"""The disk cache: arrays under a key that says all they depend on; verified, never trusted."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantgate.atomic import write_atomically

Arrays = Mapping[str, NDArray[Any]]
# Entries that nobody read for so long are of a package, or of a model, that is no longer used.
DAYS_KEPT = 30
ROOMS = ("subject", "formats", "patches", "measuring")
# An entry, its lock, and what a killed process left of writing it.
_OWN = re.compile(r"\.?[0-9a-f]{64}\.(safetensors|lock)(\..*)?")


@dataclass(frozen=True)
class DiskCache:
    """Entries of named arrays in a directory, one file each."""

    directory: Path

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return where the entry for a key lies: the key's hash is its name."""
        digest = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.directory / f"{digest}.safetensors"

    def read(self, key: Mapping[str, Any]) -> Arrays | None:
        """Return an entry; None where there is none.

        `DamagedEntry` where a byte of it, or its key, is not what was written.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as stream:
                arrays = {name: stream.get_tensor(name) for name in stream.keys()}
                metadata = stream.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise DamagedEntry(f"{path}: damaged ({error})") from None
        if metadata.get("key") != _canonical(key) or metadata.get("sha256") != _digest(arrays):
            raise DamagedEntry(f"{path}: not what was written")
        with suppress(OSError):  # others' entries may be read, too
            path.touch()
        return arrays

    def write(self, key: Mapping[str, Any], arrays: Arrays) -> None:
        """Store an entry, which appears whole or not at all."""
        from safetensors.numpy import save

        metadata = {"key": _canonical(key), "sha256": _digest(arrays)}
        content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)
        write_atomically(self.path(key), content)

    @contextmanager
    def alone(self, key: Mapping[str, Any], waiting: Callable[[], None]) -> Iterator[None]:
        """Hold an exclusive lock on this entry, so that only one process computes it.

        `waiting` is called where one is. The lock of a process that was killed is gone with it.
        """
        from filelock import FileLock, Timeout

        self.directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path(key).with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            waiting()
            held = lock.acquire()
        with held:
            yield

    def forget_unused(self) -> None:
        """Remove entries that were not read for `DAYS_KEPT` days; nothing else in the directory."""
        oldest = time.time() - DAYS_KEPT * 24 * 3600
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        for path in found:
            with suppress(OSError):  # another process may be at it, or it may be others'
                if _OWN.fullmatch(path.name) and path.stat().st_mtime < oldest:
                    path.unlink()


class DamagedEntry(ValueError):
    """A cache entry that is not what was written; it is computed anew."""


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """Return the sha256 over the sources that measure: any change of them makes entries stale.

    Of `ROOMS`, which import nothing from the others: how a measurement is judged or shown does not
    change it.
    """
    return _digest_of(Path(__file__).parent.parent)


def _digest_of(package: Path) -> str:
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()

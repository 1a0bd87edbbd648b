"""The disk cache: arrays under a key of everything they depend on; verified on every read."""

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
from quantgate.formats import builds
from quantgate.measuring.environment import library_versions
from quantgate.subject.files import identity

Arrays = Mapping[str, NDArray[Any]]
# Entries unread for this long belong to a package version or a model that is no longer used.
DAYS_KEPT = 30
ROOMS = ("subject", "formats", "patches", "measuring")
# An entry, its lock, and the partial file that a killed process leaves behind.
_OWN = re.compile(r"\.?[0-9a-f]{64}\.(safetensors|lock)(\..*)?")


@dataclass(frozen=True)
class DiskCache:
    """Entries of named arrays in a directory, one file each."""

    directory: Path

    def path(self, key: Mapping[str, Any]) -> Path:
        """Return the path of a key's entry, which is named by the key's hash."""
        digest = hashlib.sha256(_canonical(key).encode()).hexdigest()
        return self.directory / f"{digest}.safetensors"

    def read(self, key: Mapping[str, Any]) -> Arrays | None:
        """Return an entry, or None if there is none.

        Raises `DamagedEntry` if its bytes or its key differ from what was written.
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
        with suppress(OSError):  # the entry may be another user's, and readable only
            path.touch()
        return arrays

    def write(self, key: Mapping[str, Any], arrays: Arrays) -> None:
        """Store an entry atomically."""
        from safetensors.numpy import save

        metadata = {"key": _canonical(key), "sha256": _digest(arrays)}
        content = save({name: np.ascontiguousarray(a) for name, a in arrays.items()}, metadata)
        write_atomically(self.path(key), content)

    @contextmanager
    def alone(self, key: Mapping[str, Any], waiting: Callable[[], None]) -> Iterator[None]:
        """Hold an exclusive lock on this entry, so that only one process computes it.

        `waiting` is called if another process holds it. A killed process releases its lock.
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
        """Remove entries unread for `DAYS_KEPT` days, and nothing else in the directory."""
        oldest = time.time() - DAYS_KEPT * 24 * 3600
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        for path in found:
            with suppress(OSError):  # in use by another process, or another user's file
                if _OWN.fullmatch(path.name) and path.stat().st_mtime < oldest:
                    path.unlink()


class DamagedEntry(ValueError):
    """A cache entry differs from what was written; it is computed again."""


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True, separators=(",", ":"))


def _digest(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


def measurement_key(
    directory: Path, source: str, probe: str, dtype: str, **more: Any
) -> dict[str, Any]:
    """Return what a measurement of a checkpoint depends on; `probe` is the probe's sha256."""
    return {
        "source": source,
        "identity": identity(directory),
        "probe": probe,
        "dtype": dtype,
        "code": code_version(),
        "versions": library_versions(),
        "arithmetic": builds.arithmetic(),
        **more,
    }


@functools.cache
def code_version() -> str:
    """Return the sha256 of the measuring sources; any change to them makes entries stale.

    Covers `ROOMS`, which import nothing from the other rooms: how a measurement is judged or shown
    does not change it.
    """
    return _digest_of(Path(__file__).parent.parent)


def _digest_of(package: Path) -> str:
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((package / room).rglob("*.py")):
            digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()

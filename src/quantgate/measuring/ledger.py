"""The ledger of a run: takes each measurement once, and keeps it by what it depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from quantgate.measuring.cache import DamagedEntry, DiskCache
from quantgate.measuring.codec import from_arrays, to_arrays
from quantgate.measuring.measurement import Announce, Measurement
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.probe import Probe

Found = TypeVar("Found")


class Key(NamedTuple):
    """The key of a measurement in memory: its source, dtype, checkpoint and probe.

    It has no checkpoint id: checkpoints with the same base and engine settings share the base's
    measurements.
    """

    source: str
    """What measured it, e.g. "vLLM" or "HF reference"."""
    dtype: str
    directory: Path
    settings: EngineSettings
    is_base: bool
    probe: str
    """sha256 of the probe."""

    @classmethod
    def of(cls, source: str, dtype: str, checkpoint: Checkpoint, probe: Probe) -> Key:
        """Return the key of what `source` measures of a checkpoint, on a probe."""
        directory, settings = checkpoint.directory, checkpoint.engine
        return cls(source, dtype, directory, settings, checkpoint.is_base, probe.sha256)


@dataclass(eq=False)
class Ledger:
    """The measurements of this run, in memory and, where they may be kept, on disk."""

    announce: Callable[[str], None]
    """Called with a line of progress: what is being measured, and how long it took."""
    cache: DiskCache | None = None
    notes: list[str] = field(default_factory=list)
    """What must be reported, e.g. that a cache entry was damaged."""
    taken: dict[Key, Any] = field(default_factory=dict)

    def once(
        self,
        key: Key,
        name: str,
        measure: Callable[[Announce], Found],
        stored_as: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> Found:
        """Return the value kept under a key, calling `measure` the first time.

        `name` is the checkpoint's, for progress. `stored_as` returns what a `Measurement` depends
        on, its key on disk, or None if it is not kept there.
        """
        if key in self.taken:
            found: Found = self.taken[key]
            return found
        started = time.monotonic()

        def announce(what: str) -> None:
            self.announce(f"{name} · {key.source} · {key.dtype}: {what}")

        def anew() -> Any:
            announce("loading")
            found = measure(announce)
            announce(f"done in {time.monotonic() - started:.1f} s")
            return found

        disk_key = None if self.cache is None else stored_as()
        if self.cache is None or disk_key is None:
            self.taken[key] = anew()
        elif (recalled := self._recall(self.cache, disk_key)) is not None:
            announce("from the cache")
            self.taken[key] = recalled
        else:
            self.taken[key] = self._stored(self.cache, disk_key, anew, announce)
        result: Found = self.taken[key]
        return result

    def forget_others(self, kept: set[Path]) -> list[Any]:
        """Drop and return the measurements of checkpoints in other directories."""
        others = [key for key in self.taken if key.directory not in kept]
        return [self.taken.pop(key) for key in others]

    def _stored(
        self,
        cache: DiskCache,
        key: Mapping[str, Any],
        anew: Callable[[], Measurement],
        announce: Announce,
    ) -> Measurement:
        """Measure what is not cached, unless another process, e.g. an xdist worker, is doing so."""
        with cache.alone(key, lambda: announce("another process measures it")):
            if (found := self._recall(cache, key)) is None:
                found = anew()
                cache.write(key, to_arrays(found))
            return found

    def _recall(self, cache: DiskCache, key: Mapping[str, Any]) -> Measurement | None:
        try:
            arrays = cache.read(key)
        except DamagedEntry as error:
            if (note := f"{error}; it was computed anew") not in self.notes:
                self.notes.append(note)
            return None
        return None if arrays is None else from_arrays(arrays)

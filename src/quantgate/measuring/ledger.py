"""The ledger of a run: each thing is measured once, and kept under what it depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from quantgate.measuring.cache import DamagedEntry, DiskCache
from quantgate.measuring.codec import from_arrays, to_arrays
from quantgate.measuring.measurement import Announce, Measurement
from quantgate.subject.checkpoint import EngineSettings

Found = TypeVar("Found")


class Key(NamedTuple):
    """What is kept in memory under its source, dtype, checkpoint and probe.

    Not by a checkpoint's id: those with one base and the same engine settings share what is
    measured of it.
    """

    source: str
    """What measured it, e.g. "vLLM" or "HF reference"."""
    dtype: str
    directory: Path
    settings: EngineSettings
    is_base: bool
    probe: str
    """sha256 of the probe."""


@dataclass(eq=False)
class Ledger:
    """What was measured in this run, in memory and, for what may be kept, on disk."""

    announce: Callable[[str], None]
    """Told what is measured, and for how long."""
    cache: DiskCache | None = None
    notes: list[str] = field(default_factory=list)
    """What the run's reader must know, e.g. that a cache entry was damaged."""
    taken: dict[Key, Any] = field(default_factory=dict)

    def once(
        self,
        key: Key,
        name: str,
        measure: Callable[[Announce], Found],
        stored_as: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> Found:
        """Return what is kept under a key; what `measure` gives, at the first call.

        `name` is the checkpoint's, for progress. `stored_as` gives what a `Measurement` depends on,
        its key on disk, or None for what is not kept there.
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
        """Let go of what was measured of checkpoints in other directories, and return it."""
        others = [key for key in self.taken if key.directory not in kept]
        return [self.taken.pop(key) for key in others]

    def _stored(
        self,
        cache: DiskCache,
        key: Mapping[str, Any],
        anew: Callable[[], Measurement],
        announce: Announce,
    ) -> Measurement:
        """Measure what is not in the cache, unless another process does: an xdist worker, say."""
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

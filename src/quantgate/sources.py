"""The sources of one gate run: each measurement is taken once, however many checks read it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from quantgate import engine, reference
from quantgate.checkpoint import Checkpoint, read_config
from quantgate.engine import Announce
from quantgate.measurement import Measurement
from quantgate.probe import Probe, probe_for

SERVING = "serving"


@dataclass
class Sources:
    """Measures checkpoints on the device at hand and remembers the results."""

    probe: Probe
    announce: Announce
    notes: list[str] = field(default_factory=list)
    """What the run's reader must know, e.g. that a probe was tokenized anew."""
    _taken: dict[tuple[object, ...], Measurement] = field(default_factory=dict)
    _probes: dict[str, Probe] = field(default_factory=dict)

    def engine(self, checkpoint: Checkpoint, dtype: str) -> Measurement:
        """Measure with vLLM; `dtype` is a torch name or "serving"."""
        dtype = resolve_dtype(checkpoint, dtype)
        return self._once(
            "vLLM",
            checkpoint,
            dtype,
            lambda announce: engine.measure(
                checkpoint.directory,
                self.probe_of(checkpoint),
                settings=checkpoint.engine,
                dtype=dtype,
                announce=announce,
            ),
        )

    def reference(self, checkpoint: Checkpoint, dtype: str) -> Measurement:
        """Measure with HF modules over decompressed weights."""
        dtype = resolve_dtype(checkpoint, dtype)
        return self._once(
            "HF reference",
            checkpoint,
            dtype,
            lambda announce: reference.measure(
                checkpoint.directory, self.probe_of(checkpoint), dtype=dtype, announce=announce
            ),
        )

    def probe_of(self, checkpoint: Checkpoint) -> Probe:
        """Return the probe in the checkpoint's token ids; a base is scored on the same ones."""
        key = checkpoint.id.removesuffix("-base")
        if key not in self._probes:
            self._probes[key], note = probe_for(self.probe, checkpoint.directory)
            self.notes += [note] if note else []
        return self._probes[key]

    def _once(
        self,
        source: str,
        checkpoint: Checkpoint,
        dtype: str,
        measure: Callable[[Announce], Measurement],
    ) -> Measurement:
        # Not by id: checkpoints with one base and one engine setting share its measurements.
        probe = self.probe_of(checkpoint).sha256
        key = (source, checkpoint.directory, checkpoint.engine, dtype, probe)
        if key not in self._taken:
            started = time.monotonic()

            def announce(what: str) -> None:
                self.announce(f"{checkpoint.id} · {source} · {dtype}: {what}")

            announce("loading")
            self._taken[key] = measure(announce)
            announce(f"done in {time.monotonic() - started:.1f} s")
        return self._taken[key]


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> str:
    """Return the torch name of a dtype; "serving" is what the checkpoint is served in."""
    if dtype != SERVING:
        return dtype
    config = read_config(checkpoint.directory)
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float16" if stored == "float16" else "bfloat16"

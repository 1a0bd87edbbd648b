"""The sources of one gate run: each measurement is taken once, however many checks read it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from quantgate.formats import builds
from quantgate.formats.builds import Narrowing
from quantgate.formats.kernels import FORMATS_RULES, LinearRules, rules_of
from quantgate.measuring import engine, pooling, reference, serving
from quantgate.measuring.cache import DamagedEntry, DiskCache, code_version
from quantgate.measuring.capture import Capture
from quantgate.measuring.divergence import Divergence, Side, divergence
from quantgate.measuring.engine import Announce
from quantgate.measuring.environment import library_versions
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.parameters import DequantizerName
from quantgate.measuring.pooling import Steps, steps
from quantgate.measuring.precision import SERVING, resolve_dtype, sharpest_dtype
from quantgate.measuring.reference import Head
from quantgate.measuring.reference_device import CPU, choose_device, free_memory
from quantgate.measuring.replay import Replay, replay
from quantgate.measuring.scratch import scratch_directory
from quantgate.measuring.serving import Reruns
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import actual_scheme, identity
from quantgate.subject.probe import Probe, probe_for
from quantgate.subject.scheme import UNQUANTIZED
from quantgate.subject.task import EMBED, Task

Derived = TypeVar("Derived")


@dataclass(eq=False)
class Sources:
    """Measures checkpoints on the device at hand and remembers the results.

    References and unquantized bases are remembered on disk too, if there is a cache. Checkpoints
    under test are always served anew.
    """

    probes: Callable[[Task, bool], Probe]
    """The probe of a task, in the ids of the tokenizer that it was made with; the larger one, of
    models that pool, where the second argument is true."""
    announce: Announce
    cache: DiskCache | None = None
    reference_device: str | None = None
    """"cpu" or "cuda"; None: a GPU where there is one."""
    notes: list[str] = field(default_factory=list)
    """What the run's reader must know, e.g. that a probe was tokenized anew."""
    served_again: Callable[[Sources, Checkpoint, str], Sequence[Probe]] = lambda *_: ()
    """Which probes `reruns` will be asked for of a checkpoint in a torch dtype: an engine that can
    serves them before it ends."""
    _taken: dict[tuple[object, ...], Any] = field(default_factory=dict)
    _captures: dict[tuple[object, ...], Capture | None] = field(default_factory=dict)
    _probes: dict[tuple[str, bool], Probe] = field(default_factory=dict)
    _chunkable: set[Path] = field(default_factory=set)
    """The checkpoints whose prompts vLLM can cut into chunks: not those that read both ways."""
    _heads: dict[Path, Head] = field(default_factory=dict)
    """The ones that were used last, the last one at the end."""
    _scratch: Path | None = None
    """Where captures lie; gone with this object, or with the process."""

    def engine(self, checkpoint: Checkpoint, dtype: str) -> Measurement:
        """Measure with vLLM; `dtype` is a torch name or "serving"."""
        dtype = resolve_dtype(checkpoint, dtype)
        key = self._key("vLLM", checkpoint, dtype)

        def measure(announce: Announce) -> Measurement:
            self._make_room()
            measured, self._captures[key] = engine.measure(
                checkpoint.directory,
                self.probe_of(checkpoint),
                settings=checkpoint.engine,
                dtype=dtype,
                announce=announce,
                # What is compared with another engine's result need not be captured.
                capture_into=None if checkpoint.is_base else self._capture_directory(),
                meanwhile=lambda llm: self._on_the_way(checkpoint, dtype, llm),
            )
            return measured

        stored_as = self._engine_disk_key(checkpoint, dtype, self.probe_of(checkpoint))
        found: Measurement = self._once(key, checkpoint, measure, stored_as)
        return found

    def _on_the_way(self, checkpoint: Checkpoint, dtype: str, llm: Any) -> None:
        """Measure what else an engine is wanted for, so that none like it is started again."""
        if checkpoint.has_quality and dtype == resolve_dtype(checkpoint, SERVING):
            self._for_quality(checkpoint, lambda _, serve: serve(llm))
        if checkpoint.is_base:
            return
        chunked = llm.llm_engine.model_config.is_chunked_prefill_supported
        if chunked:
            self._chunkable.add(checkpoint.directory)
        if not chunked or serving.can_cut(llm):
            for probe in self.served_again(self, checkpoint, dtype):
                self._reruns(checkpoint, dtype, probe, llm)
        if checkpoint.task == EMBED and dtype == sharpest_dtype(checkpoint):
            self.late_interaction(checkpoint, llm)

    def for_quality(self, checkpoint: Checkpoint) -> Measurement:
        """Measure the larger probe, in the dtype that is served.

        The engine of `engine(checkpoint, "serving")` does it on the way, where that one runs.
        """
        dtype = resolve_dtype(checkpoint, SERVING)
        self.engine(checkpoint, dtype)
        return self._for_quality(
            checkpoint,
            lambda announce, serve: self._with_engine(checkpoint, dtype, {}, serve, announce),
        )

    def _for_quality(
        self, checkpoint: Checkpoint, run: Callable[[Announce, Callable[[Any], Any]], Any]
    ) -> Measurement:
        """Measure for quality in an engine that `run` finds."""
        probe = self.probe_of(checkpoint, quality=True)
        dtype = resolve_dtype(checkpoint, SERVING)

        def serve(llm: Any) -> Measurement:
            return engine.serve(llm, probe, engine.provenance_of(llm, dtype))

        found: Measurement = self._once(
            self._key("vLLM, for quality", checkpoint, dtype, probe),
            checkpoint,
            lambda announce: run(announce, serve),
            self._engine_disk_key(checkpoint, dtype, probe),
        )
        return found

    def _engine_disk_key(
        self, checkpoint: Checkpoint, dtype: str, probe: Probe
    ) -> dict[str, Any] | None:
        """Return what a base's measurement is kept under; None for what is under test."""
        if not checkpoint.is_base:
            return None
        settings = asdict(checkpoint.engine)
        return self._disk_key("engine", checkpoint, dtype, probe, settings=settings)

    def reference(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        dequantizer: DequantizerName = "own",
        narrowing: Narrowing | None = None,
    ) -> Measurement:
        """Measure with HF modules over weights from our dequantizer or the library's.

        In bfloat16, rotations and attention round as this build's do, or as `narrowing` says.
        """
        dtype = resolve_dtype(checkpoint, dtype)
        narrowing = (narrowing or builds.narrowing()) if dtype == "bfloat16" else "rounds"
        source = "HF reference" if dequantizer == "own" else f"HF reference ({dequantizer})"
        if narrowing == "truncates":
            source += ", which truncates"
        device = self._device()
        if device != CPU:
            source += f" on {device}"
        rules = self._rules(checkpoint)  # its engine has come and gone before the reference starts
        found: Measurement = self._once(
            self._key(source, checkpoint, dtype),
            checkpoint,
            lambda announce: reference.measure(
                checkpoint.directory,
                self.probe_of(checkpoint),
                dtype=dtype,
                announce=announce,
                dequantizer=dequantizer,
                narrowing=narrowing,
                rules=rules,
                device=device,
            ),
            self._disk_key(
                "reference",
                checkpoint,
                dtype,
                self.probe_of(checkpoint),
                arithmetic=builds.arithmetic(device),
                device=device,
                dequantizer=dequantizer,
                narrowing=narrowing,
                rules={"kept": sorted(rules.kept), "fp8_products": rules.fp8_products},
            ),
        )
        return found

    def _rules(self, checkpoint: Checkpoint) -> LinearRules:
        """Return what the kernels make of a checkpoint that vLLM chose for it, in any dtype."""
        if checkpoint.is_base or actual_scheme(checkpoint.directory) == UNQUANTIZED:
            return FORMATS_RULES
        own = (key for key in self._taken if key[0] == "vLLM" and key[2] == checkpoint.directory)
        dtype = next((str(key[1]) for key in own), SERVING)
        return rules_of(self.engine(checkpoint, dtype).provenance.kernels.values())

    def replay(self, checkpoint: Checkpoint, dtype: str) -> Replay:
        """Replay what the engine of `engine(checkpoint, dtype)` did to a few windows."""
        dtype = resolve_dtype(checkpoint, dtype)
        self.engine(checkpoint, dtype)
        capture = self._captures[self._key("vLLM", checkpoint, dtype)]
        assert capture is not None
        found: Replay = self._once(
            self._key("replay", checkpoint, dtype),
            checkpoint,
            lambda announce: replay(
                checkpoint.directory,
                self.probe_of(checkpoint),
                capture,
                announce=announce,
                rules=self._rules(checkpoint),
                device=self._device(),
            ),
            None,
        )
        return found

    def reruns(self, checkpoint: Checkpoint, dtype: str, probe: Probe) -> Reruns:
        """Serve a probe again in several ways, with prompts cut into chunks where vLLM can."""
        dtype = resolve_dtype(checkpoint, dtype)
        self.engine(checkpoint, dtype)
        return self._reruns(checkpoint, dtype, probe)

    def _reruns(self, checkpoint: Checkpoint, dtype: str, probe: Probe, llm: Any = None) -> Reruns:
        chunked = checkpoint.directory in self._chunkable
        found: Reruns = self._served(
            "vLLM, served otherwise",
            checkpoint,
            dtype,
            probe,
            serving.chunking(chunked=chunked),
            lambda llm, probe: serving.reruns(llm, probe, dtype, chunked=chunked),
            llm,
        )
        return found

    def once(
        self, name: str, checkpoint: Checkpoint, dtype: str, derive: Callable[[], Derived]
    ) -> Derived:
        """Return what `derive` makes of measurements, made at the first call for a dtype."""
        key = self._key(name, checkpoint, resolve_dtype(checkpoint, dtype))
        found: Derived = self._once(key, checkpoint, lambda _: derive(), None)
        return found

    def engine_again(self, checkpoint: Checkpoint, dtype: str, probe: Probe) -> Measurement:
        """Serve a probe and nothing else: for a checkpoint with other engine settings."""
        dtype = resolve_dtype(checkpoint, dtype)
        found: Measurement = self._served(
            "vLLM, set otherwise",
            checkpoint,
            dtype,
            probe,
            {},
            lambda llm, probe: engine.serve(llm, probe, engine.provenance_of(llm, dtype)),
        )
        return found

    def steps(self, checkpoint: Checkpoint) -> Steps:
        """Serve the probe in `sharpest_dtype` and give the rows of the step tag only."""
        more = pooling.pooling_arguments(
            checkpoint.directory, checkpoint.task, step_tag_id=checkpoint.step_tag_id
        )
        probe = self.probe_of(checkpoint)
        name = "vLLM, STEP pooling"
        dtype = sharpest_dtype(checkpoint)
        found: Steps = self._served(name, checkpoint, dtype, probe, more, steps)
        return found

    def late_interaction(self, checkpoint: Checkpoint, llm: Any = None) -> np.ndarray[Any, Any]:
        """Return what `LLM.score` gives for a part of the probe [queries, documents].

        The part is `serving.mixed`'s. The engine of `engine` in `sharpest_dtype` does it on the
        way: that is `llm`.
        """
        probe, _ = serving.mixed(self.probe_of(checkpoint))
        serve, dtype = pooling.late_interaction_scores, sharpest_dtype(checkpoint)
        found: np.ndarray[Any, Any] = self._served(
            "vLLM, LLM.score", checkpoint, dtype, probe, {}, serve, llm
        )
        return found

    def _served(
        self,
        name: str,
        checkpoint: Checkpoint,
        dtype: str,
        probe: Probe,
        more: Mapping[str, Any],
        serve: Callable[[Any, Probe], Any],
        llm: Any = None,
    ) -> Any:
        """Serve a probe with `llm`, or with an engine of its own where that is None."""

        def measure(announce: Announce) -> Any:
            if llm is not None:
                return serve(llm, probe)
            return self._with_engine(
                checkpoint, dtype, more, lambda llm: serve(llm, probe), announce
            )

        return self._once(self._key(name, checkpoint, dtype, probe), checkpoint, measure, None)

    def _with_engine(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        more: Mapping[str, Any],
        serve: Callable[[Any], Any],
        announce: Announce,
    ) -> Any:
        arguments = pooling.pooling_arguments(checkpoint.directory, checkpoint.task)
        self._make_room()
        with engine.running_engine(
            checkpoint.directory,
            settings=checkpoint.engine,
            dtype=dtype,
            **{**arguments, **more},
        ) as llm:
            announce("serving")
            return serve(llm)

    def divergence(
        self,
        base: Measurement,
        base_of: Checkpoint,
        other: Measurement,
        checkpoint: Checkpoint,
        probe: Probe,
    ) -> Divergence:
        """Return how far a measurement's distributions are from a base's, over the vocabulary.

        Both are of `probe`.
        """
        targets = [np.array(window.ids[window.score_from :]) for window in probe.windows]
        return divergence(
            self._side(base, base_of),
            self._side(other, checkpoint),
            np.concatenate(targets),
            self._device(),
        )

    def _side(self, measured: Measurement, checkpoint: Checkpoint) -> Side:
        assert measured.hidden is not None
        logits, vocabulary = self._head(checkpoint)
        return Side(measured.hidden, logits, vocabulary)

    def _head(self, checkpoint: Checkpoint) -> Head:
        """Return a checkpoint's head; a base's and its checkpoint's stay in memory, no others."""
        head = self._heads.pop(checkpoint.directory, None)
        self._heads[checkpoint.directory] = head or reference.read_head(
            checkpoint.directory, self._device()
        )
        if len(self._heads) > 2:
            self._heads.pop(next(iter(self._heads)))
        return self._heads[checkpoint.directory]

    def _device(self) -> str:
        """Return the device that references and heads compute on."""
        return choose_device(self.reference_device)

    def _make_room(self) -> None:
        """Leave a GPU to the engine that is about to start: heads are read again after it."""
        if self._device() != CPU:
            self._heads.clear()
            free_memory(self._device())

    def probe_of(self, checkpoint: Checkpoint, *, quality: bool = False) -> Probe:
        """Return the probe in the checkpoint's token ids; a base is scored on the same ones."""
        name = checkpoint.id.removesuffix("-base") if checkpoint.is_base else checkpoint.id
        key = (name, quality)
        if key not in self._probes:
            probe = self.probes(checkpoint.task, quality)
            self._probes[key], note = probe_for(probe, checkpoint.directory)
            self.notes += [note] if note else []
        return self._probes[key]

    def forget_others(self, checkpoint: Checkpoint) -> None:
        """Let go of what was measured of other checkpoints: memory, and captures on disk.

        What the checkpoint and its base have in common with them is kept.
        """
        base = checkpoint.base_checkpoint
        kept = {one.directory for one in (checkpoint, base) if one is not None}
        for key in [key for key in self._taken if key[2] not in kept]:
            del self._taken[key]
        for key in [key for key in self._captures if key[2] not in kept]:
            if (capture := self._captures.pop(key)) is not None:
                shutil.rmtree(capture.directory, ignore_errors=True)

    def _capture_directory(self) -> Path:
        if self._scratch is None:
            self._scratch = scratch_directory(self)
        return Path(tempfile.mkdtemp(dir=self._scratch))

    def _key(
        self, source: str, checkpoint: Checkpoint, dtype: str, probe: Probe | None = None
    ) -> tuple[object, ...]:
        # Not by id: checkpoints with one base and one engine setting share its measurements.
        sha256 = (probe or self.probe_of(checkpoint)).sha256
        return (source, dtype, checkpoint.directory, checkpoint.engine, checkpoint.is_base, sha256)

    def _disk_key(
        self, source: str, checkpoint: Checkpoint, dtype: str, probe: Probe, **more: Any
    ) -> dict[str, Any]:
        return {
            "source": source,
            "identity": identity(checkpoint.directory),
            "probe": probe.sha256,
            "dtype": dtype,
            "code": code_version(),
            "versions": library_versions(),
            "arithmetic": builds.arithmetic(),
            **more,
        }

    def _once(
        self,
        key: tuple[object, ...],
        checkpoint: Checkpoint,
        measure: Callable[[Announce], Any],
        stored_as: Mapping[str, Any] | None,
    ) -> Any:
        if key in self._taken:
            return self._taken[key]
        started = time.monotonic()

        def announce(what: str) -> None:
            self.announce(f"{checkpoint.id} · {key[0]} · {key[1]}: {what}")

        def anew() -> Any:
            announce("loading")
            found = measure(announce)
            announce(f"done in {time.monotonic() - started:.1f} s")
            return found

        if self.cache is None or stored_as is None:
            found = anew()
        elif (found := self._recall(self.cache, stored_as)) is not None:
            announce("from the cache")
        else:
            found = self._stored(self.cache, stored_as, anew, announce)
        self._taken[key] = found
        return found

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
        return None if arrays is None else _from_arrays(arrays)


def to_arrays(measured: Measurement) -> dict[str, np.ndarray[Any, Any]]:
    """Return what a cache entry holds of a measurement."""
    held = ((field.name, getattr(measured, field.name)) for field in fields(measured))
    arrays = {name: value for name, value in held if isinstance(value, np.ndarray)}
    if measured.hidden is not None:
        arrays["hidden"] = _packed(measured.hidden)
    provenance = msgspec.json.encode(measured.provenance)
    return {**arrays, "provenance": np.frombuffer(provenance, np.uint8)}


def _packed(hidden: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return hidden states in half the bytes where they were in 16 bits: nothing is rounded."""
    bits = np.ascontiguousarray(hidden).view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16)  # bfloat16, which NumPy has no name for
    with np.errstate(over="ignore"):
        half = hidden.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), hidden) else hidden


def _unpacked(stored: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Undo `_packed`."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _from_arrays(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Measurement:
    provenance = msgspec.convert(json.loads(arrays["provenance"].tobytes()), Provenance)
    found: dict[str, Any] = {**arrays, "provenance": provenance}
    if "hidden" in found:
        found["hidden"] = _unpacked(found["hidden"])
    return Measurement(**found)

"""A case: one checkpoint in one dtype and its measurements, each taken once in a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from quantgate.formats import builds
from quantgate.formats.builds import Narrowing
from quantgate.formats.kernels import FORMATS_RULES, LinearRules, rules_of
from quantgate.measuring import pooling, reference, reruns, session
from quantgate.measuring.cache import measurement_key
from quantgate.measuring.divergence import Divergence, Side, divergence
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Key
from quantgate.measuring.loaded import LoadAudit, audits_of
from quantgate.measuring.measurement import Announce, Measurement
from quantgate.measuring.parameters import DequantizerName
from quantgate.measuring.pooling import Steps
from quantgate.measuring.precision import FLOAT32, SERVING, resolve_dtype, sharpest_dtype
from quantgate.measuring.replay import Replay, replay
from quantgate.measuring.reruns import Reruns
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.files import actual_scheme
from quantgate.subject.probe import Probe
from quantgate.subject.scheme import UNQUANTIZED
from quantgate.subject.task import EMBED, GENERATE
from quantgate.subject.windows import Rows, mixed

Found = TypeVar("Found")

# What the ledger keeps: a measurement, its capture, and whether vLLM can chunk its prompts.
ENGINE, CAPTURE, CHUNKS, LOADED = "vLLM", "capture", "chunked prefill", "load audit"


@dataclass(frozen=True, eq=False)
class Case:
    """A checkpoint in a dtype. Its measurements are taken on first use, and kept.

    With a cache, references and unquantized bases are kept on disk too. Checkpoints under test are
    served afresh in every run.
    """

    checkpoint: Checkpoint
    dtype: str
    """torch's name of it."""
    lab: Lab
    scored: Probe | None = None
    """What is scored instead of the lab's probe of the checkpoint."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str, lab: Lab) -> Case:
        """Return the case of a dtype, given by its torch name or as "serving"."""
        return cls(checkpoint, resolve_dtype(checkpoint, dtype), lab)

    # The case itself -----------------------------------------------------------------------------

    @property
    def probe(self) -> Probe:
        """What is scored."""
        return self.scored or self.lab.probe_of(self.checkpoint)

    @property
    def mixed(self) -> tuple[Probe, Rows]:
        """What is served again in other ways, and its rows of the probe [m]."""
        return mixed(self.probe, whole=self.lab.tier_of(self.checkpoint) == "full")

    @property
    def quality_probe(self) -> Probe:
        """What is scored for `quality`: for a pooling model, more documents."""
        return self.lab.probe_of(self.checkpoint, quality=True)

    @property
    def by_value(self) -> bool:
        """Whether values are judged one by one: float32, and no quantized input code can flip."""
        return self.dtype == FLOAT32 and not self.checkpoint.quantizes_activations

    def within(self, dtype: str) -> Case:
        """Return the same checkpoint's case in another dtype."""
        return dataclasses.replace(self, dtype=resolve_dtype(self.checkpoint, dtype))

    def on(self, probe: Probe) -> Case:
        """Return the same case on other windows."""
        return dataclasses.replace(self, scored=probe)

    @property
    def is_served(self) -> bool:
        """Whether its dtype is the serving dtype."""
        return self.dtype == resolve_dtype(self.checkpoint, SERVING)

    @property
    def served(self) -> Case:
        """The case in the serving dtype."""
        return self.within(SERVING)

    @property
    def sharpest(self) -> Case:
        """The case in the dtype that resolves the smallest difference."""
        return self.within(sharpest_dtype(self.checkpoint))

    @property
    def base(self) -> Case | None:
        """The unquantized base, in this dtype or in its own serving dtype."""
        if (base := self.checkpoint.base_checkpoint) is None:
            return None
        return Case.of(base, SERVING if self.is_served else self.dtype, self.lab)

    # Engines -------------------------------------------------------------------------------------

    @property
    def engine(self) -> Measurement:
        """What vLLM gives for the probe.

        The same engine also takes the other measurements that need one like it, so that it is
        started only once.
        """

        def measure(announce: Announce) -> Measurement:
            self.lab.make_room()
            measured, captured = session.measure(
                self.checkpoint.directory,
                self.probe,
                settings=self.checkpoint.engine,
                dtype=self.dtype,
                announce=announce,
                # A result that is only compared with a second engine's needs no capture.
                capture_into=None if self.checkpoint.is_base else self.lab.capture_directory(),
                audit_load=self.is_served and not self.checkpoint.is_base,
                meanwhile=self._on_the_way,
            )
            if captured is not None:
                self.lab.ledger.taken[self._key(CAPTURE)] = captured
            return measured

        return self._once(ENGINE, measure, stored_as=lambda: self._engine_disk_key(self.probe))

    def keep_engine(self, measured: Measurement) -> None:
        """Use a measurement taken elsewhere as `engine`, e.g. from another way of serving."""
        self.lab.ledger.taken[self._key(ENGINE)] = measured

    @property
    def loaded(self) -> tuple[LoadAudit | None, ...]:
        """What each rank of the serving engine has loaded, held against the file.

        None if this vLLM's loading cannot be watched.
        """
        _ = self.served.engine
        found: tuple[LoadAudit | None, ...] = self.lab.ledger.taken[self.served._key(LOADED)]
        return found

    def _on_the_way(self, llm: Any) -> None:
        checkpoint = self.checkpoint
        if checkpoint.has_quality and self.is_served and not self._has_one_probe:
            self._for_quality(llm)
        if checkpoint.is_base:
            return
        self.lab.ledger.taken[self._key(LOADED)] = audits_of(llm)
        # False for bidirectional attention.
        chunked = llm.llm_engine.model_config.is_chunked_prefill_supported
        self.lab.ledger.taken[self._key(CHUNKS)] = chunked
        if not chunked or reruns.can_cut(llm):
            for probe in self.lab.served_again(self):
                self._reruns(probe, llm)
        if checkpoint.task == EMBED and self.dtype == sharpest_dtype(checkpoint):
            self._late_interaction(llm)

    @property
    def for_quality(self) -> Measurement:
        """What vLLM gives for the larger probe in the serving dtype, with `engine`'s engine."""
        served = self.served
        measured = served.engine
        return measured if served._has_one_probe else served._for_quality(None)

    @property
    def _has_one_probe(self) -> bool:
        return self.probe.task == GENERATE and self.quality_probe.sha256 == self.probe.sha256

    def _for_quality(self, llm: Any) -> Measurement:
        probe = self.quality_probe

        def serve(llm: Any) -> Measurement:
            return session.serve(llm, probe, session.provenance_of(llm, self.dtype))

        return self._served(
            f"{ENGINE}, for quality", probe, serve, llm, lambda: self._engine_disk_key(probe)
        )

    def reruns(self, probe: Probe) -> Reruns:
        """Serve a probe again in several ways, with chunked prompts where vLLM can chunk them."""
        _ = self.engine
        return self._reruns(probe, None)

    def _reruns(self, probe: Probe, llm: Any) -> Reruns:
        chunked: bool = self.lab.ledger.taken.get(self._key(CHUNKS), False)
        return self._served(
            f"{ENGINE}, served otherwise",
            probe,
            lambda llm: reruns.reruns(llm, probe, self.dtype, chunked=chunked),
            llm,
            **reruns.chunking(chunked=chunked),
        )

    @property
    def late_interaction(self) -> np.ndarray[Any, Any]:
        """What `LLM.score` gives for the `mixed` part of the probe [queries, documents]."""
        return self._late_interaction(None)

    def _late_interaction(self, llm: Any) -> np.ndarray[Any, Any]:
        probe, _ = mixed(self.probe)
        return self._served(
            f"{ENGINE}, LLM.score",
            probe,
            lambda llm: pooling.late_interaction_scores(llm, probe),
            llm,
        )

    @property
    def steps(self) -> Steps:
        """What STEP pooling gives for the probe: only the rows at the step tag."""
        more = pooling.pooling_arguments(
            self.checkpoint.directory, self.checkpoint.task, step_tag_id=self.checkpoint.step_tag_id
        )
        probe = self.probe
        return self._served(
            f"{ENGINE}, STEP pooling", probe, lambda llm: pooling.steps(llm, probe), **more
        )

    def set_otherwise(self, settings: EngineSettings, probe: Probe) -> Measurement:
        """Return what an engine with different settings gives for a probe."""
        case = dataclasses.replace(
            self, checkpoint=dataclasses.replace(self.checkpoint, engine=settings)
        )
        return case._served(
            f"{ENGINE}, set otherwise",
            probe,
            lambda llm: session.serve(llm, probe, session.provenance_of(llm, self.dtype)),
        )

    def _served(
        self,
        source: str,
        probe: Probe,
        serve: Callable[[Any], Found],
        llm: Any = None,
        stored_as: Callable[[], Mapping[str, Any] | None] = lambda: None,
        **more: Any,
    ) -> Found:
        """Serve a probe with `llm`, or with a new engine if `llm` is None."""

        def measure(announce: Announce) -> Found:
            if llm is not None:
                return serve(llm)
            self.lab.make_room()
            return session.in_new_engine(self.checkpoint, self.dtype, announce, serve, **more)

        return self._once(source, measure, probe, stored_as)

    # References ----------------------------------------------------------------------------------

    def reference(
        self,
        dtype: str,
        dequantizer: DequantizerName = "own",
        narrowing: Narrowing | None = None,
    ) -> Measurement:
        """Measure with HF modules over weights from our dequantizer or compressed-tensors'.

        In bfloat16, rotations and attention round as this vLLM build does, or by `narrowing`.
        """
        narrowing = (narrowing or builds.narrowing()) if dtype == "bfloat16" else "rounds"
        device = self.lab.device
        rules = self._rules()  # first: its engine must have ended before the reference starts
        return self.within(dtype)._once(
            reference.name_of(dequantizer, narrowing, device, rules),
            lambda announce: reference.measure(
                self.checkpoint.directory,
                self.probe,
                dtype=dtype,
                announce=announce,
                dequantizer=dequantizer,
                narrowing=narrowing,
                rules=rules,
                device=device,
            ),
            stored_as=lambda: self.within(dtype)._disk_key(
                "reference",
                self.probe,
                arithmetic=builds.arithmetic(device),
                device=device,
                dequantizer=dequantizer,
                narrowing=narrowing,
                rules=rules.as_key(),
            ),
        )

    @property
    def exact(self) -> Measurement:
        """The reference in float32."""
        return self.reference(FLOAT32)

    def rounded(self, narrowing: Narrowing | None = None) -> Measurement:
        """Return a reference that differs from `exact` by rounding alone.

        It is in this case's dtype, or in float64 if that is float32.
        """
        return self.reference("float64" if self.dtype == FLOAT32 else self.dtype, "own", narrowing)

    @property
    def replay(self) -> Replay:
        """The reference computed on the inputs of the engine's linears, for a few windows."""
        return self.replay_in(FLOAT32)

    def replay_in(self, dtype: str) -> Replay:
        """Return a replay whose reference computes in a dtype: float32 or float64."""
        _ = self.engine
        capture = self.lab.ledger.taken[self._key(CAPTURE)]
        return self._once(
            f"replay in {dtype}",
            lambda announce: replay(
                self.checkpoint.directory,
                self.probe,
                capture,
                announce=announce,
                dtype=dtype,
                rules=self._rules(),
                device=self.lab.device,
            ),
        )

    def _rules(self) -> LinearRules:
        """Return the rules of the kernels that vLLM chose for the checkpoint in this dtype."""
        checkpoint = self.checkpoint
        if checkpoint.is_base or actual_scheme(checkpoint.directory) == UNQUANTIZED:
            return FORMATS_RULES
        dtype = FLOAT32 if self.dtype == "float64" else self.dtype  # which vLLM does not serve
        own = Case.of(checkpoint, dtype, self.lab)  # an engine that the gate starts anyway
        return rules_of(own.engine.provenance.kernels.values())

    # Derived from measurements -------------------------------------------------------------------

    def divergence(
        self, base: Measurement, other: Measurement, probe: Probe, *, base_of: Case | None = None
    ) -> Divergence:
        """Return how far a measurement's distributions are from a base's, over the vocabulary.

        Both score `probe`; `other` is this checkpoint's, `base` is `base_of`'s or this one's too.
        """
        targets = [np.array(window.ids[window.score_from :]) for window in probe.windows]
        return divergence(
            (base_of or self)._side(base),
            self._side(other),
            np.concatenate(targets),
            self.lab.device,
        )

    def _side(self, measured: Measurement) -> Side:
        assert measured.hidden is not None
        return Side(measured.hidden, *self.lab.head(self.checkpoint.directory))

    def once(self, name: str, derive: Callable[[], Found]) -> Found:
        """Return the result of `derive`, computed at the first call."""
        return self._once(name, lambda _: derive())

    # Keeping -------------------------------------------------------------------------------------

    def _once(
        self,
        source: str,
        measure: Callable[[Announce], Found],
        probe: Probe | None = None,
        stored_as: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> Found:
        key = self._key(source, probe)
        return self.lab.ledger.once(key, self.checkpoint.id, measure, stored_as)

    def _key(self, source: str, probe: Probe | None = None) -> Key:
        return Key.of(source, self.dtype, self.checkpoint, probe or self.probe)

    def _engine_disk_key(self, probe: Probe) -> dict[str, Any] | None:
        """Return a base's key on disk; None for a checkpoint under test."""
        if not self.checkpoint.is_base:
            return None
        return self._disk_key("engine", probe, settings=asdict(self.checkpoint.engine))

    def _disk_key(self, source: str, probe: Probe, **more: Any) -> dict[str, Any]:
        return measurement_key(self.checkpoint.directory, source, probe.sha256, self.dtype, **more)

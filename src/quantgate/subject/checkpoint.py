"""A checkpoint under test, as its file says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantgate.subject.files import locate, read_config
from quantgate.subject.processor import CONDITIONS
from quantgate.subject.scheme import UNQUANTIZED, quantizes_activations
from quantgate.subject.task import (
    GENERATE,
    Task,
    task_of,
)


@dataclass(frozen=True)
class EngineSettings:
    """`[engine]`: what vLLM is started with. What is left out is vLLM's default."""

    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    kernels: Literal["native", "portable"] = "native"
    """On CPU, "portable" dequantizes weights everywhere, even where the build has a kernel of its
    own, so that a golden holds on every machine; native kernels are judged by fidelity."""


@dataclass(frozen=True)
class BudgetOverride:
    """`[budget.<check>]`: a margin other than the scheme's default, and why."""

    margin: float
    """In nat per token."""
    reason: str


@dataclass(frozen=True)
class KnownFailure:
    """`[[known_failure]]`: a check that is known to fail, why, and where that is followed up.

    It must fail as long as it is listed: a check that passes after all says so, and fails, unless
    the entry is not `strict`.
    """

    check: str
    """E.g. "replay-float32"."""
    reason: str
    issue: str
    when: str | None = None
    """A condition of `processor.CONDITIONS`; None where it fails on every machine."""
    strict: bool = True
    """False where it may also pass, because it fails by little."""

    def applies(self, *, on_processor: bool) -> bool:
        """Whether it fails here: a processor's condition is of kernels that run on it."""
        return self.when is None or (on_processor and CONDITIONS[self.when]())


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint under test. Its id names the TOML file, the golden directory and the tests."""

    id: str
    source: str
    """A path that starts with `.` or `/` (relative to the project), or a hub id."""
    scheme: str | None = None
    """What config.json must say, e.g. "W4A16"; None for a checkpoint given by path."""
    base: str | None = None
    """The unquantized model, like `source`."""
    revision: str | None = None
    """What `source` is pinned to: a 40-digit hub commit, or "sha256:" and the identity."""
    task: Task = GENERATE
    step_tag_id: int | None = None
    """The token that ends a step, of a model that rewards steps."""
    invariance: tuple[Literal["tensor-parallel", "compiled"], ...] = ()
    """What else may not matter: an engine of two ranks, a compiled one. Each is one more to load,
    and the first needs another GPU."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    budget: Mapping[str, BudgetOverride] = field(default_factory=dict)
    root: Path = field(default_factory=Path.cwd, compare=False)
    """What relative paths are relative to."""
    quick: bool = False
    """Whether `--quick` judges it: a choice with every format, task and check in it."""
    not_quick: tuple[str, ...] = ()
    """The checks that `--quick` leaves out all the same, e.g. "invariance-float32"."""
    golden: bool = True
    """False for a checkpoint given by path, which has no approved golden, and where a file
    says so: native CPU kernels differ from machine to machine, and are judged by fidelity."""
    is_base: bool = False
    """Whether this is the unquantized base of the checkpoint whose engine settings it has."""
    known_failure: tuple[KnownFailure, ...] = ()

    def __hash__(self) -> int:
        return hash((self.id, self.source))

    @property
    def directory(self) -> Path:
        """The checkpoint's files on this machine."""
        return locate(self.source, self.revision, self.root)

    @property
    def base_checkpoint(self) -> Checkpoint | None:
        """The unquantized base under the same engine settings, if one is named."""
        if self.base is None:
            return None
        return Checkpoint(
            id=f"{self.id}-base",
            source=self.base,
            scheme=UNQUANTIZED,
            task=self.task,
            step_tag_id=self.step_tag_id,
            engine=self.engine,
            root=self.root,
            golden=False,
            is_base=True,
        )

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs or the KV cache are quantized, which makes free-running values chaotic."""
        return quantizes_activations(read_config(self.directory).get("quantization_config"))

    @property
    def has_own_metric(self) -> bool:
        """Whether its task comes to a number besides perplexity.

        Hidden states of a model that generates do not: perplexity judges it, in a file of its own.
        """
        return self.task != GENERATE and task_of(read_config(self.directory)) != GENERATE

    @property
    def has_quality(self) -> bool:
        """Whether `quality` compares it with a base, or it is the base that is compared with."""
        compared = self.is_base or self.base is not None
        return compared and (self.task == GENERATE or self.has_own_metric)

    def known_failure_of(self, check: str, *, on_processor: bool) -> KnownFailure | None:
        """Return the known failure of a check whose kernels run on the processor, or do not."""
        known = (k for k in self.known_failure if k.check == check)
        return next((k for k in known if k.applies(on_processor=on_processor)), None)

"""A checkpoint under test, as described by its TOML file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from quantgate.subject.files import locate, read_config
from quantgate.subject.processor import CONDITIONS
from quantgate.subject.scheme import UNQUANTIZED, quantizes_activations
from quantgate.subject.task import GENERATE, Task, task_of
from quantgate.subject.tier import Tier


@dataclass(frozen=True)
class EngineSettings:
    """`[engine]`: vLLM's engine arguments. Omitted ones keep vLLM's defaults."""

    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    kv_cache_dtype: str = "auto"
    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None
    kernels: Literal["native", "portable"] = "native"
    """On CPU, "portable" uses emulated kernels even if the build has a native one, so that a
    golden holds on every machine. Native kernels are judged by fidelity."""


@dataclass(frozen=True)
class BudgetOverride:
    """`[budget.<check>]`: a margin other than the scheme's default, and why."""

    margin: float
    """In nat per token."""
    reason: str


@dataclass(frozen=True)
class KnownFailure:
    """`[[known_failure]]`: a check that is known to fail, the reason, and the issue that tracks it.

    The check must fail for as long as it is listed. If it passes and the entry is `strict`, the
    gate reports that as a failure.
    """

    check: str
    """E.g. "replay-float32"."""
    reason: str
    issue: str
    when: str | None = None
    """A condition of `processor.CONDITIONS`; None if it fails on every machine."""
    strict: bool = True
    """False if it fails only narrowly and may also pass."""

    def applies(self, kernels: Collection[str]) -> bool:
        """Whether it is expected to fail here, with the kernels that served."""
        return self.when is None or CONDITIONS[self.when](kernels)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint under test. Its id names the TOML file, the golden directory and the tests."""

    id: str
    source: str
    """A path that starts with `.` or `/` (relative to the project), or a hub id."""
    scheme: str | None = None
    """The scheme that config.json must have, e.g. "W4A16"; None for a checkpoint given by path."""
    base: str | None = None
    """The unquantized model, like `source`."""
    revision: str | None = None
    """The pinned version of `source`: a 40-digit hub commit, or "sha256:" and the identity."""
    task: Task = GENERATE
    step_tag_id: int | None = None
    """For a process reward model: the token that ends a step."""
    invariance: tuple[Literal["tensor-parallel", "compiled"], ...] = ()
    """Other engines that must give the same scores: one with two ranks, a compiled one. Each is
    loaded in addition, and the first needs a second GPU."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    budget: Mapping[str, BudgetOverride] = field(default_factory=dict)
    root: Path = field(default_factory=Path.cwd, compare=False)
    """The project directory; relative paths start here."""
    file: str = ""
    """Its TOML file, relative to the project; "" for a checkpoint given by path."""
    probe: str | None = None
    """The probe to score instead of its task's embedded one: a name in `fixtures/probes`, or a
    path that starts with `.` or `/`, as in `source`."""
    tier: Tier = "standard"
    """How much of the gate it must pass to be released."""
    quick: bool = False
    """Whether `--quick` includes it; the quick selection covers every format, task and check."""
    not_quick: tuple[str, ...] = ()
    """Checks of it that `--quick` skips, e.g. "invariance-float32"."""
    golden: bool = True
    """False for a checkpoint given by path, which has no approved golden, and if its file says
    so: native CPU kernels differ between machines and are judged by fidelity instead."""
    is_base: bool = False
    """Whether this is the unquantized base of another checkpoint, with that one's settings."""
    known_failure: tuple[KnownFailure, ...] = ()

    def __hash__(self) -> int:
        return hash((self.id, self.source))

    @property
    def directory(self) -> Path:
        """The checkpoint's files on this machine."""
        return locate(self.source, self.revision, self.root)

    @property
    def base_checkpoint(self) -> Checkpoint | None:
        """The unquantized base under the same engine settings, or None if no base is named."""
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
            probe=self.probe,
            tier=self.tier,
            golden=False,
            is_base=True,
        )

    @property
    def quantizes_activations(self) -> bool:
        """Whether inputs or the KV cache are quantized, which makes free-running values chaotic."""
        return quantizes_activations(read_config(self.directory).get("quantization_config"))

    @property
    def has_own_metric(self) -> bool:
        """Whether its task has a metric other than perplexity.

        Hidden states of a generative model have none: a separate checkpoint file with the task
        "generate" judges that model by perplexity.
        """
        return self.task != GENERATE and task_of(read_config(self.directory)) != GENERATE

    @property
    def has_quality(self) -> bool:
        """Whether it takes part in a `quality` comparison, as the checkpoint or as its base."""
        compared = self.is_base or self.base is not None
        return compared and (self.task == GENERATE or self.has_own_metric)

    def known_failure_of(self, check: str, kernels: Collection[str]) -> KnownFailure | None:
        """Return the check's known failure that applies here, with the kernels that served."""
        known = (k for k in self.known_failure if k.check == check)
        return next((k for k in known if k.applies(kernels)), None)

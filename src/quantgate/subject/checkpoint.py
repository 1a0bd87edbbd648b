"""Checkpoints: what is judged, and the one file that names each of them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from quantgate.errors import BadInput, printable
from quantgate.subject.processor import CONDITIONS
from quantgate.subject.scheme import UNQUANTIZED, quantizes_activations, scheme_name
from quantgate.subject.task import (
    EMBED,
    GENERATE,
    SEQUENCE_REWARD,
    Task,
    head_tensors,
    num_labels,
    task_of,
)

CHECKPOINT_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
# Of what a table's first columns hold that a checkpoint says of itself.
LONGEST_ID = 64
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PINNED_REVISION = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")
# The checks whose margin a checkpoint's file may give.
BUDGETS = ("drift", "quality")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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
    """False for a checkpoint given by path, of which nobody approved anything yet, and where a file
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


# The keys of a checkpoint file: every field but those that do not come from it.
_NOT_IN_FILE = frozenset({"id", "root", "is_base"})


def read_checkpoint_file(path: Path, root: Path) -> Checkpoint:
    """Read `fixtures/checkpoints/<id>.toml`; `BadInput` names the file, the key and the remedy."""
    import msgspec

    if not CHECKPOINT_ID.fullmatch(path.stem):
        raise BadInput(f"{path}: the name must match {CHECKPOINT_ID.pattern}, it is the test's id.")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not a TOML file ({error}).") from None
    _refuse_unknown_keys(values, Checkpoint, path, "", _NOT_IN_FILE)
    for key in ("source", "scheme"):
        if key not in values:
            raise BadInput(f"{path}: the key '{key}' is missing.")
    try:
        checkpoint = msgspec.convert({**values, "id": path.stem}, Checkpoint)
    except msgspec.ValidationError as error:
        raise BadInput(f"{path}: {error}.") from None
    if checkpoint.revision and not PINNED_REVISION.fullmatch(checkpoint.revision):
        raise BadInput(
            f"{path}: revision '{checkpoint.revision}' is not pinned; give a 40-digit commit or "
            "'sha256:' and the identity of a local directory."
        )
    if checkpoint.step_tag_id is not None and checkpoint.task != "token_reward":
        raise BadInput(
            f"{path}: step_tag_id is for task 'token_reward', but task is '{checkpoint.task}'; "
            "leave it out, or correct task."
        )
    for name, override in checkpoint.budget.items():
        if name not in BUDGETS:
            nearest = difflib.get_close_matches(name, BUDGETS, n=1, cutoff=0.0)[0]
            raise BadInput(f"{path}: unknown table [budget.{name}]; did you mean '{nearest}'?")
        if not override.reason.strip():
            raise BadInput(f"{path}: the reason in [budget.{name}] is empty; say why it differs.")
    for known in checkpoint.known_failure:
        if known.when is not None and known.when not in CONDITIONS:
            raise BadInput(
                f"{path}: known_failure of '{known.check}': there is no condition '{known.when}', "
                f"only {', '.join(CONDITIONS)}."
            )
    return replace(checkpoint, root=root)


def _refuse_unknown_keys(
    values: Mapping[str, Any], kind: type, path: Path, where: str, skip: frozenset[str]
) -> None:
    known = sorted({f.name for f in fields(kind)} - skip)
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            place = f" in [{where}]" if where else ""
            raise BadInput(f"{path}: unknown key '{key}'{place}; did you mean '{nearest}'?")
        for name, section, inner in _sections(key, value, hints[key]):
            _refuse_unknown_keys(section, inner, path, name, frozenset())


def _sections(key: str, value: Any, hint: Any) -> list[tuple[str, Mapping[str, Any], type]]:
    """Return the tables under a key, each with its name in the file and the class that it becomes.

    What is not of the expected shape is left to the conversion, which names what is wrong.
    """
    found: list[tuple[str, Any, type]] = []
    if key == "budget" and isinstance(value, dict):
        found = [(f"budget.{name}", table, BudgetOverride) for name, table in value.items()]
    elif key == "known_failure" and isinstance(value, list):
        found = [("known_failure", table, KnownFailure) for table in value]
    elif is_dataclass(hint) and isinstance(hint, type):
        found = [(key, value, hint)]
    return [(name, table, kind) for name, table, kind in found if isinstance(table, dict)]


def read_checkpoint_files(root: Path) -> dict[str, Checkpoint]:
    """Read every checkpoint file under `root`, by id, in order of their ids."""
    files = sorted((root / "fixtures" / "checkpoints").glob("*.toml"))
    return {path.stem: read_checkpoint_file(path, root) for path in files}


def find_checkpoint(
    name: str, known: Mapping[str, Checkpoint], root: Path, base: str | None
) -> Checkpoint:
    """Return the checkpoint that `--checkpoint NAME` means: an id, a directory or a hub id."""
    if name in known:
        if base is not None:
            raise BadInput(
                f"--base goes with --checkpoint PATH; {name} names its base in its own file."
            )
        return known[name]
    is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if not is_path and not HUB_ID.fullmatch(name):
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise BadInput(
            f"--checkpoint {name}: neither a directory nor an id in "
            f"{root / 'fixtures' / 'checkpoints'}"
            + (f" (nearest: {', '.join(nearest)})." if nearest else " (which has none).")
        )
    source = str(Path(name).expanduser().absolute()) if is_path else name
    return Checkpoint(
        id=_id_from(name),
        source=source,
        base=_absolute_if_path(base),
        root=root,
        golden=False,
    )


def with_own_task(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint that does what its config.json says, for one that has no file."""
    return replace(checkpoint, task=task_of(read_config(checkpoint.directory)))


def _absolute_if_path(base: str | None) -> str | None:
    if base is None or not (base.startswith((".", "/", "~")) or Path(base).is_dir()):
        return base
    return str(Path(base).expanduser().absolute())


def _id_from(name: str) -> str:
    cleaned = re.sub(r"[^a-z0-9.-]+", "-", Path(name).name.lower()).strip("-.")
    return cleaned[:LONGEST_ID].rstrip("-.") or "checkpoint"


@functools.lru_cache(maxsize=64)
def locate(source: str, revision: str | None, root: Path) -> Path:
    """Return the directory that holds a source's files, downloading a hub id if need be."""
    if source.startswith((".", "/")):
        path = Path(source) if source.startswith("/") else root / source
        if not path.is_dir():
            raise BadInput(
                f"{path}: no such directory; correct the path, or run `make checkpoints` if it is "
                "one of the embedded checkpoints."
            )
        return path
    return _download(source, revision)


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Weights in safetensors, text files, tokenizers: nothing that could run code.
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(
            f"{source}: neither in the local hub cache nor to be downloaded ({reason}); "
            "give a local directory instead."
        ) from None


def read_config(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's `config.json`."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: missing; a checkpoint is a directory that has it.") from None
    except ValueError as error:
        raise BadInput(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(config, dict):
        raise BadInput(f"{path}: holds a {type(config).__name__}, not an object.")
    return config


def actual_scheme(directory: Path) -> str:
    """Return the scheme that a checkpoint's `config.json` says, in one short line."""
    said = read_config(directory).get("quantization_config")
    try:
        return printable(scheme_name(said))[:LONGEST_ID]
    except (AttributeError, TypeError) as error:
        raise BadInput(
            f"{directory / 'config.json'}: its quantization_config is malformed ({error}); "
            "compare it with one that llm-compressor writes."
        ) from None


def verify(checkpoint: Checkpoint) -> None:
    """Check, without reading the weights, that a checkpoint can be judged; else `BadInput`.

    Its directory, config, scheme, safetensors headers and, where it is pinned to an identity, the
    bytes themselves.
    """
    directory = checkpoint.directory
    scheme = actual_scheme(directory)
    config_path = directory / "config.json"
    if scheme == UNQUANTIZED and checkpoint.scheme != UNQUANTIZED:
        raise BadInput(
            f"{config_path}: no quantization_config, so this is not a quantized checkpoint; "
            'give it as --base, or say scheme = "none" in its file.'
        )
    if checkpoint.scheme is not None and checkpoint.scheme != scheme:
        raise BadInput(
            f"fixtures/checkpoints/{checkpoint.id}.toml: scheme is '{checkpoint.scheme}', but "
            f"{config_path} says '{scheme}'; correct whichever is wrong."
        )
    refuse_another_task(directory, checkpoint.task)
    refuse_quantized_head(directory, verify_weights(directory), checkpoint.task)
    pinned = (checkpoint.revision or "").removeprefix("sha256:")
    if len(pinned) == 64 and pinned != identity(directory):
        raise BadInput(
            f"{directory}: its identity is sha256:{identity(directory)}, but "
            f"fixtures/checkpoints/{checkpoint.id}.toml pins sha256:{pinned}; rebuild it, or pin "
            "the new one if the change is meant."
        )


def weight_files(directory: Path) -> list[Path]:
    """Return a checkpoint's safetensors files; pickled weights, which can run code, are refused."""
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return shards
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    if pickled:
        raise BadInput(
            f"{directory / pickled[0]}: pickled weights can run code and are never loaded; "
            "convert them to safetensors."
        )
    raise BadInput(f"{directory}: no *.safetensors file in it, so there are no weights to judge.")


def refuse_another_task(directory: Path, task: Task) -> None:
    """Raise `BadInput` where a checkpoint cannot do a task: it has no head for it, or another."""
    config = read_config(directory)
    does = task_of(config)
    # Hidden states can be had of any model; a token classifier may be a process reward model as
    # TRL saves it.
    if does == task == SEQUENCE_REWARD and (labels := num_labels(config)) != 1:
        raise BadInput(
            f"{directory / 'config.json'}: a classifier of whole texts with {labels} labels; only "
            "rewards, which have one, are judged."
        )
    if does == task or task == EMBED or (does, task) == ("token_classify", "token_reward"):
        return
    architectures = ", ".join(config.get("architectures") or ["model of unknown architecture"])
    raise BadInput(
        f"{directory / 'config.json'}: a {architectures} does '{does}', not '{task}'"
        + ("; it has no head for labels." if does == GENERATE else "; correct task in its file.")
    )


def refuse_quantized_head(directory: Path, tensors: Collection[str], task: Task) -> None:
    """Raise `BadInput` where the head of a model that pools is quantized on disk."""
    if task == GENERATE:
        return
    for name in head_tensors(tensors):
        head, _, part = name.rpartition(".")
        if part in ("weight_scale", "weight_packed"):
            raise BadInput(
                f"{directory}: its head, '{head}', is quantized, which vLLM cannot serve with a "
                "bias; quantize the model again with its head in `ignore`."
            )


def verify_weights(directory: Path) -> set[str]:
    """Check that every shard is whole and that the index names nothing that is missing.

    Returns the names of all tensors.
    """
    from safetensors import SafetensorError, safe_open

    present: set[str] = set()
    for shard in weight_files(directory):
        try:
            with safe_open(shard, framework="numpy") as tensors:
                present.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise BadInput(
                f"{shard}: truncated or corrupt ({error}); fetch or build it again."
            ) from None
    index = directory / "model.safetensors.index.json"
    if index.exists():
        missing = sorted(set(json.loads(index.read_text())["weight_map"]) - present)
        if missing:
            raise BadInput(
                f"{index}: names {len(missing)} tensors that no shard holds, the first of them "
                f"{missing[0]}; fetch or build the checkpoint again."
            )
    return present


# What makes a checkpoint that checkpoint, besides its weights.
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)


def identity(directory: Path) -> str:
    """Return the sha256 over a checkpoint's weights, config and tokenizer, in 64 hex digits."""
    files = [*weight_files(directory)]
    files += [directory / name for name in _IDENTITY_FILES if (directory / name).exists()]
    digest = hashlib.sha256()
    for path in sorted(files):
        stat = path.stat()
        digest.update(
            f"{path.name} {_file_sha256(path, stat.st_mtime_ns, stat.st_size)}\n".encode()
        )
    return digest.hexdigest()


@functools.lru_cache(maxsize=4096)
def _file_sha256(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

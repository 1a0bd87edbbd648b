"""A checkpoint's files: where they are, what they contain, and whether they are complete."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantgate.errors import BadInput, printable
from quantgate.subject.digests import sha256_of
from quantgate.subject.scheme import scheme_name
from quantgate.subject.task import (
    EMBED,
    GENERATE,
    SEQUENCE_REWARD,
    Task,
    head_tensors,
    num_labels,
    task_of,
)

# Of what a table's first columns hold that a checkpoint says of itself.
LONGEST_ID = 64
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@functools.lru_cache(maxsize=64)
def locate(source: str, revision: str | None, root: Path) -> Path:
    """Return the directory with a source's files; a hub id is downloaded if necessary."""
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
            f"{source}: not in the local hub cache, and the download failed ({reason}); "
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


def context_length(directory: Path) -> int | None:
    """Return how many tokens a model's config.json says that it takes; None if it does not say."""
    config = read_config(directory)
    said = config.get("max_position_embeddings", config.get("n_positions"))
    return said if isinstance(said, int) else None


def parameters_of(directory: Path) -> int:
    """Return how many parameters an unquantized model's files hold."""
    from safetensors import safe_open

    total = 0
    for shard in weight_files(directory):
        with safe_open(shard, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return total


def actual_scheme(directory: Path) -> str:
    """Return the scheme in a checkpoint's `config.json`, as one short line."""
    said = read_config(directory).get("quantization_config")
    try:
        return printable(scheme_name(said))[:LONGEST_ID]
    except (AttributeError, TypeError) as error:
        raise BadInput(
            f"{directory / 'config.json'}: its quantization_config is malformed ({error}); "
            "compare it with one that llm-compressor writes."
        ) from None


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
    """Raise `BadInput` if a checkpoint cannot do a task, because it has no head or another one."""
    config = read_config(directory)
    does = task_of(config)
    # Any model has hidden states to embed; a token classifier may be a process reward model saved
    # by TRL.
    if does == task == SEQUENCE_REWARD and (labels := num_labels(config)) != 1:
        raise BadInput(
            f"{directory / 'config.json'}: a sequence classifier with {labels} labels; only "
            "reward models, which have one label, can be judged."
        )
    if does == task or task == EMBED or (does, task) == ("token_classify", "token_reward"):
        return
    architectures = ", ".join(config.get("architectures") or ["model of unknown architecture"])
    raise BadInput(
        f"{directory / 'config.json'}: a {architectures} does '{does}', not '{task}'"
        + ("; it has no head for labels." if does == GENERATE else "; correct task in its file.")
    )


def refuse_quantized_head(directory: Path, tensors: Collection[str], task: Task) -> None:
    """Raise `BadInput` if the head of a pooling model is quantized on disk."""
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
    """Check that every shard is complete and that every tensor in the index exists.

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


# The files that identify a checkpoint, besides its weights.
_IDENTITY_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
)
GENERATION = "generation_config.json"
# Of generation_config.json: where it comes from, and what changes no answer.
_WITHOUT_EFFECT = frozenset(
    (
        "_from_model_config",
        "transformers_version",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
    )
)


def identity(directory: Path) -> str:
    """Return the sha256 over a checkpoint's weights, config and tokenizer, in 64 hex digits."""
    lines = (f"{name} {sha256}\n" for name, sha256 in digests(directory).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digests(directory: Path) -> dict[str, str]:
    """Return the sha256 of each file that identifies a checkpoint, by name, sorted."""
    files = [*weight_files(directory)]
    files += [directory / name for name in _IDENTITY_FILES if (directory / name).exists()]
    files += [directory / GENERATION] if _generates_otherwise(directory) else []
    return {path.name: digest for path, digest in sha256_of(sorted(files)).items()}


def _generates_otherwise(directory: Path) -> bool:
    """Whether generation_config.json says more than config.json does.

    transformers writes one for every model, most of which only repeat the config's token ids.
    """
    try:
        said = json.loads((directory / GENERATION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    if not isinstance(said, dict):
        return True
    config = read_config(directory)
    return any(
        key not in _WITHOUT_EFFECT and value is not None and config.get(key) != value
        for key, value in said.items()
    )

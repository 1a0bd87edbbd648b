"""Checkpoint files, and the other things that `--checkpoint` accepts."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from quantgate.errors import BadInput
from quantgate.subject.checkpoint import BudgetOverride, Checkpoint, KnownFailure
from quantgate.subject.files import (
    LONGEST_ID,
    actual_scheme,
    identity,
    read_config,
    refuse_another_task,
    refuse_quantized_head,
    verify_weights,
)
from quantgate.subject.processor import CONDITIONS
from quantgate.subject.scheme import UNQUANTIZED
from quantgate.subject.task import task_of

CHECKPOINT_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PINNED_REVISION = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")
# Checks whose margin a checkpoint's file may override.
BUDGETS = ("drift", "quality")


CHECKPOINT_FILES = Path("fixtures") / "checkpoints"

# The keys of a checkpoint file: all fields except those that do not come from the file.
_NOT_IN_FILE = frozenset({"id", "root", "file", "is_base"})


def read_checkpoint_file(path: Path, root: Path) -> Checkpoint:
    """Read `fixtures/checkpoints/<id>.toml`; `BadInput` names the file, the key and the fix."""
    import msgspec

    if not CHECKPOINT_ID.fullmatch(path.stem):
        raise BadInput(f"{path}: the name must match {CHECKPOINT_ID.pattern}; it is the test id.")
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
    _refuse_contradictions(checkpoint, path)
    return replace(checkpoint, root=root, file=_relative(path, root))


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _refuse_contradictions(checkpoint: Checkpoint, path: Path) -> None:
    """Raise `BadInput` for values that are well-formed but meaningless."""
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
    """Return the tables under a key, each with its name in the file and its dataclass.

    Values of another shape are left out; the conversion reports them.
    """
    found: list[tuple[str, Any, type]] = []
    if key == "budget" and isinstance(value, dict):
        found = [(f"budget.{name}", table, BudgetOverride) for name, table in value.items()]
    elif key == "known_failure" and isinstance(value, list):
        found = [("known_failure", table, KnownFailure) for table in value]
    elif is_dataclass(hint) and isinstance(hint, type):
        found = [(key, value, hint)]
    return [(name, table, kind) for name, table, kind in found if isinstance(table, dict)]


def read_checkpoint_files(root: Path, collection: str = ".") -> dict[str, Checkpoint]:
    """Read a project's checkpoint files; return checkpoints by id, sorted by id.

    A `collection` is a folder of files that are judged together, in `fixtures/checkpoints`. Those
    in that folder itself are what is judged if nothing else is asked for.
    """
    files = sorted((root / CHECKPOINT_FILES / collection).glob("*.toml"))
    return {path.stem: read_checkpoint_file(path, root) for path in files}


def read_all_checkpoint_files(root: Path) -> dict[str, Checkpoint]:
    """Read the checkpoint files of every collection; `BadInput` if two have the same id."""
    found = read_checkpoint_files(root)
    for folder in sorted(path for path in (root / CHECKPOINT_FILES).glob("*") if path.is_dir()):
        for name, checkpoint in read_checkpoint_files(root, folder.name).items():
            if name in found:
                raise BadInput(
                    f"{checkpoint.file}: {found[name].file} has the same name, and a checkpoint's "
                    "name must be its own; rename one of them."
                )
            found[name] = checkpoint
    return found


def find_checkpoint(
    name: str, known: Mapping[str, Checkpoint], root: Path, base: str | None
) -> Checkpoint:
    """Return the checkpoint of a name: an id in `known`, a directory or a hub id.

    `base` is that of one without a file; `root` is the project. Raises `BadInput`.
    """
    if name in known:
        if base is not None:
            raise BadInput(
                "--base goes with a checkpoint given by path or hub id, and "
                f"{known[name].file} says what {name}'s base is; leave it out."
            )
        return known[name]
    is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
    if not is_path and not HUB_ID.fullmatch(name):
        nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise BadInput(
            f"{name}: neither a directory, nor a hub id (ORGANIZATION/MODEL), nor the name of a "
            f"file in {root / CHECKPOINT_FILES}"
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
    """Return a checkpoint without a file; its task comes from its config.json."""
    return replace(checkpoint, task=task_of(read_config(checkpoint.directory)))


def _absolute_if_path(base: str | None) -> str | None:
    if base is None or not (base.startswith((".", "/", "~")) or Path(base).is_dir()):
        return base
    return str(Path(base).expanduser().absolute())


def _id_from(name: str) -> str:
    cleaned = re.sub(r"[^a-z0-9.-]+", "-", Path(name).name.lower()).strip("-.")
    return cleaned[:LONGEST_ID].rstrip("-.") or "checkpoint"


def verify(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint can be judged, without loading it; raise `BadInput` otherwise.

    Checks its directory, config, scheme and safetensors headers and, if it is pinned to an
    identity, the bytes of its files.
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
            f"{checkpoint.file}: scheme is '{checkpoint.scheme}', but "
            f"{config_path} says '{scheme}'; correct whichever is wrong."
        )
    refuse_another_task(directory, checkpoint.task)
    refuse_quantized_head(directory, verify_weights(directory), checkpoint.task)
    pinned = (checkpoint.revision or "").removeprefix("sha256:")
    if len(pinned) == 64 and pinned != identity(directory):
        raise BadInput(
            f"{directory}: its identity is sha256:{identity(directory)}, but {checkpoint.file} "
            f"pins sha256:{pinned}; rebuild it, or pin the new one if the change is meant."
        )

"""Which checkpoints a run judges: those it names, or those that have a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import (
    CHECKPOINT_FILES,
    find_checkpoint,
    read_checkpoint_files,
)


@dataclass(frozen=True)
class Selection:
    """What the options of a run say of its checkpoints."""

    names: Sequence[str] = ()
    """Ids, directories or hub ids; none for all that have a file in the collection."""
    base: str | None = None
    """The base of those that are given by directory or hub id."""
    quick: bool = False
    """Only those whose file says quick = true."""
    collection: str = "."
    """The folder of `fixtures/checkpoints` to take files from."""


def selected(selection: Selection, known: Mapping[str, Checkpoint], root: Path) -> list[Checkpoint]:
    """Return the selected checkpoints, never none; `BadInput` says what else to give.

    `known` are all checkpoints that have a file in the project `root`, by id.
    """
    if selection.base is not None and not selection.names:
        raise BadInput(
            "--base goes with a checkpoint given by path or hub id; checkpoint files name their "
            "own base."
        )
    if selection.quick and selection.names:
        raise BadInput(
            "--quick cannot be combined with named checkpoints: checkpoint files say which are "
            "quick."
        )
    if selection.names:
        names = dict.fromkeys(selection.names)
        found = [find_checkpoint(name, known, root, selection.base) for name in names]
        _require_distinct(found)
        return found
    folder = root / CHECKPOINT_FILES / selection.collection
    there = read_checkpoint_files(root, selection.collection)
    if not there:
        raise BadInput(
            f"{folder}: no checkpoint file there, so there is nothing to judge; add one, or name "
            "a checkpoint by path or hub id."
        )
    found = [checkpoint for checkpoint in there.values() if checkpoint.quick or not selection.quick]
    if not found:
        raise BadInput(
            f"--quick: none of the {len(there)} files in {folder} says quick = true; add it to "
            "one, or leave out --quick."
        )
    return found


def _require_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    counts = Counter(checkpoint.id for checkpoint in checkpoints)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise BadInput(
            f"two of the checkpoints would get the id '{repeated[0]}'; give each directory its "
            "own name, or gate them one by one."
        )

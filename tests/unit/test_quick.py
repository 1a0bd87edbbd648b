"""`--quick` has every format and task."""

from pathlib import Path

from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files


def parts(checkpoints: list[Checkpoint]) -> set[str]:
    """The schemes of all groups of layers and caches, e.g. FP8 and KV_FP8 of "FP8+KV_FP8"."""
    return {part for one in checkpoints for part in (one.scheme or "").split("+")}


def test_the_quick_choice_has_every_format_and_task(root: Path) -> None:
    known = list(read_checkpoint_files(root).values())
    quick = [checkpoint for checkpoint in known if checkpoint.quick]
    assert parts(quick) == parts(known)
    assert {checkpoint.task for checkpoint in quick} == {checkpoint.task for checkpoint in known}
    assert {way for one in quick for way in one.invariance} == {"tensor-parallel", "compiled"}
    assert len(quick) <= 18 < len(known)

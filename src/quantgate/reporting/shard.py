"""A shard: every n-th checkpoint of a selection, judged by a run of its own and merged later."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from quantgate.errors import BadInput

SLURM = "slurm"
_TASK = "SLURM_ARRAY_TASK_"


@dataclass(frozen=True)
class Shard:
    """The part of a selection that one run judges.

    >>> Shard(2, 3, ("a", "b", "c", "d", "e")).own
    ('b', 'e')
    """

    number: int
    """From 1."""
    of: int
    checkpoints: tuple[str, ...]
    """The ids of the whole selection, sorted."""
    asked: Mapping[str, str] = field(default_factory=dict)
    """The options that decide what is asked of a checkpoint, as given."""

    @property
    def own(self) -> tuple[str, ...]:
        """The ids of this shard's checkpoints."""
        return self.checkpoints[self.number - 1 :: self.of]

    @property
    def name(self) -> str:
        """The shard as `--shard` names it, e.g. "2/3"."""
        return f"{self.number}/{self.of}"

    @property
    def folder(self) -> str:
        """The name of its directory in the directory of the report."""
        return f"shard-{self.number}-of-{self.of}"

    def __str__(self) -> str:
        whole = f"{len(self.checkpoints)} checkpoint{'s' if len(self.checkpoints) > 1 else ''}"
        if not self.own:
            return f"shard {self.name} has nothing to judge: the selection has {whole}"
        return f"shard {self.name} judges {len(self.own)} of {whole}: {', '.join(self.own)}"


def parse_shard(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the number, from 1, and the count of shards of "i/n", or of "slurm": an array's task.

    >>> parse_shard("2/3", {})
    (2, 3)
    >>> parse_shard("slurm", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"})
    (2, 3)
    """
    if text == SLURM:
        return _of_slurm(environment)
    if (found := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)) is None:
        raise BadInput(f"--shard {text}: give I/N, such as 1/3 for the first of three, or slurm.")
    number, of = int(found[1]), int(found[2])
    if not 1 <= number <= of:
        raise BadInput(f"--shard {text}: the shards of {of} are 1/{of} to {of}/{of}.")
    return number, of


def _of_slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return a task's place in its array, whatever number the array begins with."""
    defaults = {"MIN": "1", "STEP": "1"}
    try:
        given = {
            name: int(environment.get(f"{_TASK}{name}", defaults.get(name, "")))
            for name in ("ID", "COUNT", "MIN", "STEP")
        }
    except ValueError:
        raise BadInput(
            f"--shard slurm: {_TASK}ID and {_TASK}COUNT are not set to numbers, so this is no task "
            "of a job array; submit it with `sbatch --array=1-N`, or give --shard I/N."
        ) from None
    behind = given["ID"] - given["MIN"]
    number, of = behind // max(given["STEP"], 1) + 1, given["COUNT"]
    if behind < 0 or not 1 <= number <= of:
        raise BadInput(
            f"--shard slurm: {_TASK}ID={given['ID']} has no place among {of} tasks, so the array's "
            "numbers have gaps; submit it with --array=1-N, or give --shard I/N."
        )
    return number, of

"""Building quantized checkpoints whose bytes are pinned by their TOML files."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.subject.checkpoint_file import read_all_checkpoint_files
from quantgate.subject.files import identity
from tiny import ROOT
from tiny.recipes import Recipe

# Writes a checkpoint by its recipe into a directory.
Build = Callable[[Recipe, Path], None]


def build_pinned(recipes: Mapping[str, Recipe], built: Path, write: Build, *, pin: bool) -> int:
    """Build each checkpoint that is missing or stale; return 1 if one is not what is pinned.

    With `pin`, build all of them and write their identities into their files.
    """
    checkpoints = read_all_checkpoint_files(ROOT)
    for name, recipe in recipes.items():
        # One that vLLM refuses has no file to gate it by, and no pin.
        checkpoint = checkpoints.get(name)
        pinned = checkpoint.revision if checkpoint else None
        if not pin and is_current(built / name, pinned):
            continue
        write(recipe, built / name)
        found = f"sha256:{identity(built / name)}"
        print(f"{name}: built, {found}", flush=True)
        if checkpoint is None or pinned == found:
            continue
        if pin:
            write_pin(ROOT / checkpoint.file, found)
            continue
        print(
            f"error: {built / name}: built {found}, but {checkpoint.file} pins {pinned}; if the "
            "recipe was meant to change, run it again with --pin.",
            file=sys.stderr,
        )
        return 1
    return 0


def write_pin(path: Path, revision: str) -> None:
    """Write an identity into a checkpoint file's `revision` line."""
    text = path.read_text()
    path.write_text(re.sub(r'(?m)^revision = ".*"$', f'revision = "{revision}"', text))


def is_current(directory: Path, pinned: str | None) -> bool:
    """Whether a built checkpoint is there, whole, and the pinned one."""
    try:
        return f"sha256:{identity(directory)}" == pinned or (pinned is None and directory.is_dir())
    except (BadInput, OSError):
        return False

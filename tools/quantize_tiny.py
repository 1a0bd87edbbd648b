"""Build the embedded quantized checkpoints from the tiny base models, byte for byte the same.

    python tools/quantize_tiny.py               build what is missing or stale under build/
    python tools/quantize_tiny.py --pin         also write the new identities into the TOML files
    python tools/quantize_tiny.py --calibrate   measure the base models' activation ranges anew

Each checkpoint is written by compressed-tensors' own compressors. `fixtures/checkpoints/<id>.toml`
pins the sha256 of the result, so a build that differs in one byte is an error. Static activation
scales come from `fixtures/tiny/<base>/ranges.json`, because a forward pass is not the same to the
last bit on every machine.
"""

import argparse
import re
import sys
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import identity
from tiny import ROOT, TINY
from tiny.recipes import HEADS, RECIPES

BUILD = ROOT / "build"


def calibrate_bases() -> None:
    """Measure the activation ranges of the models that generate."""
    from tiny.calibration import calibrate

    for base in sorted({recipe.base for recipe in RECIPES.values()} - set(HEADS)):
        calibrate(TINY / base)


def pin(path: Path, revision: str) -> None:
    """Write an identity into a checkpoint file's `revision` line."""
    text = path.read_text()
    path.write_text(re.sub(r'(?m)^revision = ".*"$', f'revision = "{revision}"', text))


def build_embedded(and_pin: bool) -> int:
    """Build every checkpoint that is missing or stale; return 1 if one is not what is pinned."""
    checkpoints = read_checkpoint_files(ROOT)
    for name, recipe in RECIPES.items():
        # One that vLLM refuses has no file to gate it by, and no pin.
        pinned = checkpoints[name].revision if name in checkpoints else None
        if not and_pin and is_current(BUILD / name, pinned):
            continue
        from tiny.quantizing import (
            build,  # with torch, which takes seconds: most runs build nothing
        )

        build(TINY / recipe.base, BUILD / name, recipe)
        built = f"sha256:{identity(BUILD / name)}"
        print(f"{name}: built, {built}")
        if pinned and and_pin:
            pin(ROOT / "fixtures" / "checkpoints" / f"{name}.toml", built)
        elif pinned not in (None, built):
            print(
                f"error: {BUILD / name}: built {built}, but fixtures/checkpoints/{name}.toml pins "
                f"{pinned}; if the recipe was meant to change, run "
                "`python tools/quantize_tiny.py --pin`.",
                file=sys.stderr,
            )
            return 1
    return 0


def is_current(directory: Path, pinned: str | None) -> bool:
    """Whether a built checkpoint is there, whole, and the pinned one."""
    try:
        return f"sha256:{identity(directory)}" == pinned or (pinned is None and directory.is_dir())
    except (BadInput, OSError):
        return False


def main() -> int:
    """Build the embedded checkpoints; calibrate and pin where that is asked for."""
    parser = argparse.ArgumentParser(description="Build the embedded quantized checkpoints.")
    parser.add_argument(
        "--pin", action="store_true", help="write the new identities into the TOMLs"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the activation ranges anew, first"
    )
    arguments = parser.parse_args()
    if arguments.calibrate:
        calibrate_bases()
    return build_embedded(and_pin=arguments.pin)


if __name__ == "__main__":
    sys.exit(main())

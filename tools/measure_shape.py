"""Measure what judging a checkpoint costs, phase by phase: seconds and peak memory.

    python tools/measure_shape.py build/shapes/8b-w4a16 --tokens 512

Each phase runs in a process of its own. "products" are the reference's matrix products alone, in
float32 at this machine's own rate: what a reference cannot be faster than.
"""

import argparse
import sys
from pathlib import Path

from shapes import phases


def main() -> int:
    """Print a row a phase."""
    parser = argparse.ArgumentParser(description="Measure the phases of judging a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=512, help="of the reference's probe")
    parser.add_argument("--phase", choices=phases.PHASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tokens < phases.WINDOW:
        parser.error(f"--tokens must be {phases.WINDOW} or more")
    if given.phase:
        print(phases.run(given.checkpoint, given.phase, given.tokens))
        return 0
    found = {}
    for phase in phases.PHASES:
        found[phase] = phases.measure(given.checkpoint, phase, given.tokens)
        print(f"{phase:16} {found[phase].seconds:8.2f} s {found[phase].peak_gib:7.2f} GiB")
    ratio = found["reference"].seconds / found["products"].seconds
    print(f"reference / products {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

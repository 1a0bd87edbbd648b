"""Regenerate the goldens of this checkout: `quantgate approve`, whose options it takes.

    python tools/regen_golden.py --checkpoint tiny-llama-w4a16 --reason "first release"
    python tools/regen_golden.py --all --reason "vLLM 0.33" --dry-run

Exit status: 0 if all goldens are up to date, 1 if one was refused, 2 for bad input.
"""

import sys
from pathlib import Path

from quantgate.__main__ import BAD_INPUT
from quantgate.__main__ import main as quantgate

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Command-line entry point; returns 1 if a golden was refused, 2 on a user error."""
    status = quantgate(["approve", "--project", str(ROOT), *sys.argv[1:]])
    return 2 if status == BAD_INPUT else status


if __name__ == "__main__":
    sys.exit(main())

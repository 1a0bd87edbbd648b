"""`python -m quantgate budgets`: what every check allows, and where the number comes from."""

import argparse
import sys
from pathlib import Path

from quantgate.checkpoint import BadInput, read_checkpoint_files
from quantgate.report.budgets import budgets_table


def main() -> int:
    """Parse the command line; errors of the user are one sentence."""
    parser = argparse.ArgumentParser(prog="python -m quantgate")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    budgets = commands.add_parser("budgets", help="print what every check allows, and why")
    budgets.add_argument(
        "--project", type=Path, default=Path.cwd(), help="where fixtures/checkpoints lies"
    )
    arguments = parser.parse_args()
    try:
        print(budgets_table(read_checkpoint_files(arguments.project).values()), end="")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

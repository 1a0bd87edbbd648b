"""Judge a small random model of each architecture, in each format, and report the results.

    python tools/architectures.py                     all of them, into docs/architectures.md
    python tools/architectures.py opt gemma2          some of them, to the terminal
    python tools/architectures.py --update mixtral    some, in place of their rows on the page

vLLM serves each in float32, and the result is compared with the reference, token by token and
linear by linear. Then one linear, in the engine only, gets a scale that is 5 % off, which replay
must detect and name.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from architecture_runs import UNQUANTIZED, Row, Run, not_run, table, updated
from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from random_architectures import ARCHITECTURES
from random_models import FORMATS, make, quantize

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architectures.md"


def rows_of(name: str, formats: tuple[str, ...], directory: Path) -> list[Row]:
    """Build an architecture's model, and judge it in each format."""
    import torch

    architecture = ARCHITECTURES[name]
    base = directory / "base"
    model = make(architecture, base)
    rows = []
    for preset in formats:
        path = base if preset == UNQUANTIZED else directory / preset
        try:
            if preset != UNQUANTIZED:
                with torch.compiler.set_stance("force_eager"):
                    quantize(model, base, path, preset, architecture.ignore)
        except BadInput as error:
            rows.append(not_run(name, preset, str(error)))
        else:
            rows.append(Run(name, preset, path, architecture.task, directory / "captures").row())
        print(rows[-1].line, flush=True)
    return rows


def main() -> int:
    """Judge the requested architectures; return 1 if any fails without a known reason."""
    parser = argparse.ArgumentParser(description="Judge small random models of architectures.")
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE", help="all, if none is given")
    parser.add_argument("--formats", nargs="*", help="default: all that the page shows")
    parser.add_argument("--update", action="store_true", help="replace these rows on the page")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.names or ARCHITECTURES:
        if name not in ARCHITECTURES:
            parser.error(f"no architecture '{name}'; there are {', '.join(ARCHITECTURES)}")
        with tempfile.TemporaryDirectory() as scratch:
            every = (UNQUANTIZED, *FORMATS, *ARCHITECTURES[name].more_formats)
            rows += rows_of(name, tuple(arguments.formats or every), Path(scratch))
    if arguments.update or not arguments.names:
        page = updated(PAGE.read_text("utf-8"), rows) if arguments.update else table(rows)
        write_atomically(PAGE, page)
        print(f"wrote {PAGE.relative_to(ROOT)}")
    unexpected = [r for r in rows if r.failed and not ARCHITECTURES[r.name].known_fault]
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())

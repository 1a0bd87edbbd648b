"""What quantization costs on any text, stopping as soon as the answer is clear.

    python tools/sequential_quality.py --checkpoint tiny-llama-w4a16
    python tools/sequential_quality.py --checkpoint PATH --base PATH --text-file corpus.txt

The base scores all of the text first; the checkpoint only as much of it as is needed. Exits 0 for a
pass, 1 for anything else, 2 for bad input.
"""

import argparse
import sys
from pathlib import Path

from quantgate.commands.sequential import Progress, probe_of_text, quality_until_clear
from quantgate.errors import BadInput
from quantgate.judging.budget import quality_margin
from quantgate.judging.stats import FEWEST_CLUSTERS
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.precision import SERVING
from quantgate.subject.checkpoint_file import find_checkpoint, read_checkpoint_files, verify
from quantgate.subject.files import actual_scheme
from quantgate.subject.probe import embedded_probe, probe_for
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    """Print a line of progress past the results."""
    print(f"  {text}", file=sys.stderr)


def run(arguments: argparse.Namespace) -> Progress:
    """Score until it is clear, or until the text ends."""
    known = read_checkpoint_files(ROOT)
    checkpoint = find_checkpoint(arguments.checkpoint, known, ROOT, arguments.base)
    verify(checkpoint)
    if checkpoint.task != GENERATE:
        raise BadInput(f"{checkpoint.id}: its task is '{checkpoint.task}', and has no perplexity.")
    margin = quality_margin(checkpoint, actual_scheme(checkpoint.directory))
    if arguments.text_file:
        texts = [path.read_text(encoding="utf-8") for path in arguments.text_file]
        probe = probe_of_text(texts, checkpoint.directory)
    else:
        probe, _ = probe_for(embedded_probe(ROOT, GENERATE), checkpoint.directory)
    cache = DiskCache(ROOT / ".gate-cache")
    lab = Lab(lambda *_: probe, Ledger(say, cache))
    for progress in quality_until_clear(Case.of(checkpoint, SERVING, lab), probe, margin):
        bounds = (
            f"between {progress.lower:.4g} and {progress.upper:.4g}"
            if progress.documents >= FEWEST_CLUSTERS
            else f"no bounds before {FEWEST_CLUSTERS} documents"
        )
        print(
            f"{progress.documents:>6} documents, {progress.tokens:>9,} tokens: mean ΔNLL "
            f"{progress.mean:.4g} nat/token, {bounds} (margin {margin:g})",
            flush=True,
        )
    print(f"{checkpoint.id} quality: {progress.outcome.upper()}")
    return progress


def main() -> int:
    """Parse the command line; errors of the user are one sentence."""
    parser = argparse.ArgumentParser(description="Quality, on as much text as it takes.")
    parser.add_argument("--checkpoint", required=True, metavar="PATH_OR_ID")
    parser.add_argument("--base", metavar="PATH_OR_ID", help="of a checkpoint given by path")
    parser.add_argument(
        "--text-file",
        action="append",
        type=Path,
        metavar="FILE",
        help="UTF-8 text to score instead of the embedded probe; may be repeated",
    )
    try:
        progress = run(parser.parse_args())
    except (BadInput, EngineFailure, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if progress.outcome == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())

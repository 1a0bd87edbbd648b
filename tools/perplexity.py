"""Perplexity of a model in vLLM's score mode, under the protocol of a published number.

    python tools/perplexity.py --model build/tiny-llama-w4a16 --text-file corpus.txt
    python tools/perplexity.py --model org/model --dataset wikitext \\
        --dataset-config wikitext-2-raw-v1 --protocol llama.cpp

The same as `quantgate ppl`, which takes the model as its first argument.
"""

import argparse
import sys

from quantgate.commands import ppl
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Perplexity in score mode, by a published protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory, or name on the hub")
    ppl.add_arguments(parser)
    return parser.parse_args(arguments)


def main() -> int:
    """Command-line entry point; returns 2 on a user error."""
    try:
        return ppl.run(parse_arguments())
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Train the tiny checkpoints that the tests and the embedded suites run on, and their probes.

    python tools/make_tiny.py                           the Llama, and the probes
    python tools/make_tiny.py --architecture qwen3      the Qwen3; the probes come out the same

The corpus, the tokenizer and the probes depend on the seed alone. The weights also depend on the
machine's arithmetic, so their hash and their perplexity are recorded beside them.
"""

import argparse
import json
from pathlib import Path

from quantgate.atomic import write_atomically
from tiny import ROOT, TINY
from tiny.probes import HELDOUT_DOCUMENTS, heldout_windows, make_probes, probe_lines
from tiny.record import make_record
from tiny.tokenizer import save_tokenizer, train_tokenizer
from tiny.training import (
    ARCHITECTURES,
    STEPS,
    check_disjoint,
    make_batches,
    new_model,
    save_model,
    train,
)

SMALLEST_RATIO = 5.0


def main() -> None:
    """Make the tokenizer, the probe and the checkpoint; exit 1 when too little was learned."""
    parser = argparse.ArgumentParser(description="Train a tiny model and write its probe.")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--out", type=Path, help="default: fixtures/tiny/<architecture>")
    parser.add_argument("--probes", type=Path, default=ROOT / "fixtures/probes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    tokenizer = train_tokenizer(arguments.seed)
    windows = heldout_windows(tokenizer, HELDOUT_DOCUMENTS, arguments.seed)
    check_disjoint(windows, arguments.seed)
    batches = make_batches(tokenizer, arguments.seed)
    model = new_model(arguments.architecture, arguments.seed)
    training = train(model, batches, arguments.steps)

    folder = arguments.out or TINY / arguments.architecture
    save_model(training.model, folder)
    save_tokenizer(tokenizer, folder)
    for name, probe in make_probes(tokenizer, arguments.seed).items():
        lines = "".join(probe_lines(name, probe))
        write_atomically(arguments.probes / f"{name}.jsonl", lines)
    record = make_record(folder, windows, batches, training, arguments.seed)
    write_atomically(folder / "training.json", json.dumps(record, indent=2) + "\n")
    print(
        f"perplexity {record['heldout_perplexity']:.2f}, "
        f"unigram {record['unigram_perplexity']:.1f}, ratio {record['ratio']:.1f}"
    )
    if record["ratio"] < SMALLEST_RATIO:
        raise SystemExit(
            f"the model is only {record['ratio']:.1f} times better than a unigram model; "
            f"it must be {SMALLEST_RATIO:.0f} times better"
        )


if __name__ == "__main__":
    main()

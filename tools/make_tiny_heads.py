"""Train the tiny models with token and reward heads that the pooling suites run on.

    python tools/make_tiny_heads.py             all of them
    python tools/make_tiny_heads.py ner-bert …  only these
    python tools/make_tiny_heads.py --probes    what they are probed with

Decoders begin as the tiny Llama (a Qwen2 is a Llama with biases on queries, keys and values), so
they know the corpus and its arithmetic. What each of them learned is measured on held-out documents
and recorded beside its weights.
"""

import argparse
import sys
from typing import Any

import torch
from transformers import AutoTokenizer

from quantgate.atomic import write_atomically
from tiny import ROOT
from tiny.heads.models import BASE
from tiny.heads.probes import PROBES, QUALITY, probe_lines
from tiny.heads.tasks import SMALLEST_SCORE, TASKS
from tiny.heads.training import save, train

# Documents of each kind that are tested on.
HELDOUT = 300


def main() -> int:
    """Train, test and save the models asked for; 1 if one of them learned too little."""
    parser = argparse.ArgumentParser(description="Train the tiny models with token heads.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--probes", action="store_true", help="write their probes, train nothing")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if arguments.probes:
        write_probes(tokenizer)
        return 0
    names = arguments.names or list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        print(f"error: there is no {unknown[0]!r}, only {', '.join(TASKS)}.", file=sys.stderr)
        return 2
    return int(min([make(name, tokenizer) for name in names]) < SMALLEST_SCORE)


def write_probes(tokenizer: Any) -> None:
    """Write the probes of all of them, the small ones and those of quality."""
    for name in (*PROBES, *(f"{name}{QUALITY}" for name in PROBES)):
        text = "".join(probe_lines(name, tokenizer))
        write_atomically(ROOT / "fixtures" / "probes" / f"{name}.jsonl", text)


def make(name: str, tokenizer: Any) -> float:
    """Train, test and save one model; return the first of its scores."""
    torch.manual_seed(0)
    task = TASKS[name]
    model = task.model()
    train(name, model, list(task.examples(tokenizer, "train", task.training)), task)
    model = model.to(torch.bfloat16).float().eval()  # as it is stored
    record = task.score(model, list(task.examples(tokenizer, "heldout", HELDOUT)))
    save(model, name, {"documents": task.training, "passes": task.passes, "heldout": record})
    print(f"{name}: {', '.join(f'{what} {value:.4f}' for what, value in record.items())}")
    return next(iter(record.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Train the tiny models with token and reward heads that the pooling suites run on.

    python tools/make_tiny_heads.py             all of them
    python tools/make_tiny_heads.py ner …       only these

Decoders begin as the tiny Llama (a Qwen2 is a Llama with biases on queries, keys and values), so
they know the corpus and its arithmetic. What each of them learned is measured on held-out documents
and recorded beside its weights.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_corpus as corpus
import torch
from rich.progress import track
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from quantgate.atomic import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny"
BASE = TINY / "llama"

IGNORED = -100
NER_LABELS = ("O", *corpus.LABELS)
STEP_LABELS = ("wrong", "right")
# Documents of each kind that are trained and tested on, and tokens of one at most.
TRAINING, HELDOUT, LONGEST = 6000, 300, 256
BATCH, WARMUP, RATE = 16, 50, 1e-3
SMALLEST_SCORE = 0.9


@dataclass(frozen=True)
class Example:
    """Token ids and, for each of them, its label, or IGNORED."""

    ids: list[int]
    labels: list[int]


# What a Qwen2's config has in common with a Llama's.
SHARED_WITH_LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# What is learned ---------------------------------------------------------------------------------


def entity_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Documents of prose with the entity that each token is in, or "O"."""
    for document in corpus.documents(split, "prose", count):
        encoded = tokenizer(document.text, return_offsets_mapping=True)
        labels = [entity_of(document, *span) for span in encoded["offset_mapping"]]
        yield Example(encoded["input_ids"][:LONGEST], labels[:LONGEST])


def entity_of(document: corpus.Document, start: int, end: int) -> int:
    """Return the label of the entity that characters [start, end) are in; no entity is 0."""
    if start == end:
        return IGNORED  # a token that the tokenizer added
    return next(
        (
            NER_LABELS.index(entity.label)
            for entity in document.entities
            if entity.start < end and start < entity.end
        ),
        0,
    )


def step_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Worked problems, every other one with a wrong result; a label on each step's last token."""
    for document in corpus.documents(split, "arithmetic", count):
        text, wrong = corrupted(document.text, random.Random(f"{split}/{document.id}"))
        encoded = tokenizer(text, return_offsets_mapping=True)
        labels = [IGNORED] * len(encoded["input_ids"])
        for step in re.finditer(r"^Step .*\n", text, re.MULTILINE):
            ends = [i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end == step.end()]
            if ends:
                labels[ends[-1]] = int(step.start() not in wrong)
        yield Example(encoded["input_ids"][:LONGEST], labels[:LONGEST])


def corrupted(text: str, rng: random.Random) -> tuple[str, set[int]]:
    """Return a text with the results of some steps wrong, and where in it these steps begin."""
    parts: list[str] = []
    wrong: set[int] = set()
    at = 0
    for step in re.finditer(r"^Step .* = (\d+)\.$", text, re.MULTILINE):
        parts.append(text[at : step.start()])
        result = step[1]
        if rng.random() < 0.4:
            wrong.add(sum(map(len, parts)))
            off = rng.choice((2, 3, 10, 20))
            subtract = rng.random() < 0.5 and int(result) >= off
            result = str(int(result) - off if subtract else int(result) + off)
        parts.append(f"{text[step.start() : step.start(1)]}{result}.")
        at = step.end()
    return "".join([*parts, text[at:]]), wrong


# Models ------------------------------------------------------------------------------------------


def qwen2(kind: Any, labels: Sequence[str]) -> Any:
    """Return a Qwen2 with a head, its body the tiny Llama's."""
    llama = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    config = llama.config.to_dict()
    shared = {name: config[name] for name in SHARED_WITH_LLAMA}
    model = kind(Qwen2Config(**shared, **_labels(labels)))
    model.model.load_state_dict(llama.model.state_dict(), strict=False)  # no biases there
    return model


def bert(labels: Sequence[str]) -> Any:
    """Return a small BERT with a head, untrained: it reads both ways, as no Llama does."""
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    return BertForTokenClassification(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
            type_vocab_size=2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=2,
            **_labels(labels),
        )
    )


def _labels(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


@dataclass(frozen=True)
class Task:
    """One model: what it is, what it learns, and how many passes it takes."""

    model: Callable[[], Any]
    examples: Callable[[Any, str, int], Iterator[Example]]
    passes: int


TASKS = {
    "ner-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, NER_LABELS), entity_examples, passes=1
    ),
    "ner-bert": Task(lambda: bert(NER_LABELS), entity_examples, passes=3),
    "prm-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, STEP_LABELS), step_examples, passes=2
    ),
}


# Training ----------------------------------------------------------------------------------------


def batches(examples: Sequence[Example], seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches of ids and labels, each [BATCH, longest], of documents of like lengths."""
    rng = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), rng.random()))
    chunks = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    rng.shuffle(chunks)
    for chunk in chunks:
        longest = max(len(examples[i].ids) for i in chunk)
        ids = torch.full((len(chunk), longest), 2)
        labels = torch.full((len(chunk), longest), IGNORED)
        for row, i in enumerate(chunk):
            ids[row, : len(examples[i].ids)] = torch.tensor(examples[i].ids)
            labels[row, : len(examples[i].labels)] = torch.tensor(examples[i].labels)
        yield ids, labels


def train(name: str, model: Any, examples: Sequence[Example], passes: int) -> None:
    """Train a model in place."""
    every = [batch for number in range(passes) for batch in batches(examples, number)]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    for step, (ids, labels) in enumerate(track(every, f"Training {name}")):
        rate = RATE * min(1, (step + 1) / WARMUP) * (1 - step / len(every))
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Bytes of padding are behind every token that counts: a decoder needs no mask.
        loss = model(input_ids=ids, attention_mask=(ids != 2).long(), labels=labels).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.inference_mode()
def score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return accuracy and macro F1 of the labelled tokens."""
    found, expected = [], []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        labels = torch.tensor(example.labels)
        found.append(logits.argmax(-1)[labels != IGNORED])
        expected.append(labels[labels != IGNORED])
    predicted, true = torch.cat(found), torch.cat(expected)
    classes = [f1(predicted == label, true == label) for label in sorted(set(true.tolist()))]
    return {
        "accuracy": (predicted == true).float().mean().item(),
        "macro_f1": sum(classes) / len(classes),
        "tokens": len(true),
    }


def f1(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Return the harmonic mean of precision and recall of one class, from booleans [n]."""
    both = (predicted & true).sum().item()
    return 2 * both / max(1, predicted.sum().item() + true.sum().item())


def save(model: Any, name: str, record: dict[str, Any]) -> None:
    """Write weights in bfloat16, config, tokenizer and record, each in one step."""
    folder = TINY / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TINY) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        for written in Path(temporary).iterdir():
            written.chmod(0o644)
            written.replace(folder / written.name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        write_atomically(folder / file, (BASE / file).read_text())
    write_atomically(folder / "training.json", json.dumps(record, indent=2) + "\n")


def main() -> int:
    """Train, test and save the models asked for; 1 if one of them learned too little."""
    parser = argparse.ArgumentParser(description="Train the tiny models with token heads.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TASKS))
    names = parser.parse_args().names or list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        print(f"error: there is no {unknown[0]!r}, only {', '.join(TASKS)}.", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    status = 0
    for name in names:
        torch.manual_seed(0)
        task = TASKS[name]
        model = task.model()
        train(name, model, list(task.examples(tokenizer, "train", TRAINING)), task.passes)
        model = model.to(torch.bfloat16).float().eval()  # as it is stored
        record = score(model, list(task.examples(tokenizer, "heldout", HELDOUT)))
        save(model, name, {"documents": TRAINING, "passes": task.passes, "heldout": record})
        print(f"{name}: accuracy {record['accuracy']:.4f}, macro F1 {record['macro_f1']:.4f}")
        status |= record["macro_f1"] < SMALLEST_SCORE
    return status


if __name__ == "__main__":
    sys.exit(main())

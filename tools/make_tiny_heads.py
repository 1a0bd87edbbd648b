"""Train the tiny models with token and reward heads that the pooling suites run on.

    python tools/make_tiny_heads.py             all of them
    python tools/make_tiny_heads.py ner-bert …  only these
    python tools/make_tiny_heads.py --probes    what they are probed with

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
from functools import partial
from pathlib import Path
from typing import Any

import tiny_corpus as corpus
import torch
from rich.progress import track
from safetensors.torch import load_file
from scipy.stats import kendalltau
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from quantgate.atomic import write_atomically
from quantgate.measuring.heads import COLBERT, PROCESS_REWARD, head_classes

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "fixtures" / "tiny"
BASE = TINY / "llama"

IGNORED = -100
NER_LABELS = ("O", *corpus.LABELS)
STEP_LABELS = ("wrong", "right")
# Tokens of a probe's window at most: what is approved of each is kept in a golden.
PROBE_LENGTH = 128
QUALITY = "-quality"
STEP_TAG = "Ċ"  # the line end, as this tokenizer spells it
COLBERT_DIM = 32
PAD = 2
# Documents of each kind that are tested on, and tokens of one at most.
HELDOUT, LONGEST = 300, 256
BATCH, WARMUP = 16, 50
SMALLEST_SCORE = 0.9


@dataclass(frozen=True)
class Example:
    """Token ids and, for each of them, its label, or IGNORED; the text that they stand for."""

    ids: list[int]
    labels: list[int]
    text: str


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
    """Stories, with the entity that each token is in, or "O".

    Without their titles: transformers gives every Qwen2 a splitting of its own, by which an empty
    line is another token than in the other models.
    """
    for document in corpus.documents(split, "prose", count):
        start = document.text.index("\n\n") + 2
        text = document.text[start:]
        encoded = tokenizer(text, return_offsets_mapping=True)
        labels = [
            entity_of(document, begin + start, end + start) if begin < end else IGNORED
            for begin, end in encoded["offset_mapping"]  # nothing: what the tokenizer added
        ]
        yield Example(encoded["input_ids"][:LONGEST], labels[:LONGEST], text)


def entity_of(document: corpus.Document, start: int, end: int) -> int:
    """Return the label of the entity that characters [start, end) are in; no entity is 0."""
    return next(
        (
            NER_LABELS.index(entity.label)
            for entity in document.entities
            if entity.start < end and start < entity.end
        ),
        0,
    )


def step_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Solutions in steps, some wrong; a label on each step's line end, as TRL's trainer has it."""
    for index in range(count):
        text, labels = tidied_place(random.Random(f"{split}/steps/{index}"))
        ids = tokenizer(text)["input_ids"]
        ends = iter(labels)
        tag = tokenizer.convert_tokens_to_ids(STEP_TAG)
        yield Example(ids, [next(ends) if token == tag else IGNORED for token in ids], text)


def tidied_place(rng: random.Random) -> tuple[str, list[int]]:
    """Return a text of a few steps, and for each of them whether it is right (1) or wrong (0).

    A step is right where what it puts back belongs to the place.
    """
    place = rng.choice(corpus.TOPICS)
    elsewhere = [topic for topic in corpus.TOPICS if topic is not place]
    lines, labels = [], []
    for number in range(1, rng.randint(4, 8) + 1):
        right = rng.random() < 0.6
        thing = rng.choice((place if right else rng.choice(elsewhere)).nouns)
        lines.append(f"Step {number}: put back the {thing}.\n")
        labels.append(int(right))
    return f"{place.title} is to be tidied. " + "".join(lines), labels


def graded_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """Short stories, the words of 0 to 4 of their sentences out of order: the grade is minus that.

    The label is on the last token, where a sequence model's reward is.
    """
    for document in corpus.documents(split, "prose", count):
        rng = random.Random(f"{split}/graded/{document.id}")
        sentences = re.findall(r"[A-Z][^.]*\.(?=\s)", document.text.partition("\n\n")[2])[:4]
        damaged = rng.sample(range(len(sentences)), rng.randint(0, len(sentences)))
        for index in damaged:
            words = sentences[index].removesuffix(".").split()
            sentences[index] = " ".join(rng.sample(words, len(words))) + "."
        text = " ".join(sentences)
        ids = tokenizer(text)["input_ids"]
        yield Example(ids, [IGNORED] * (len(ids) - 1) + [-len(damaged)], text)


def retrieval_examples(tokenizer: Any, split: str, count: int) -> Iterator[Example]:
    """A question about two names, then the story that they are from, in turns."""
    for document in corpus.documents(split, "prose", count):
        story = " ".join(document.text.partition("\n\n")[2].split())
        story = re.findall(r".{60,160}?\.(?=\s|$)", story)[0]
        names = [document.text[e.start : e.end] for e in document.entities]
        here = [name for name in dict.fromkeys(names) if name in story][:2]
        for text in (f"What about {' and '.join(here)}?", story):
            ids = tokenizer(text)["input_ids"]
            yield Example(ids, [IGNORED] * len(ids), text)


# Models ------------------------------------------------------------------------------------------


def qwen2(kind: Any, labels: Sequence[str], body: Path = BASE) -> Any:
    """Return a Qwen2 with a head, its body the tiny Llama's or another Qwen2's."""
    config = json.loads((body / "config.json").read_text())
    shared = {name: config[name] for name in SHARED_WITH_LLAMA}
    model = kind(Qwen2Config(**shared, **_labels(labels)))
    stored = load_file(body / "model.safetensors")
    found = {
        name.removeprefix("model."): tensor.float()
        for name, tensor in stored.items()
        if name.startswith("model.")
    }
    missing, _ = model.model.load_state_dict(found, strict=False)
    assert all(name.endswith("_proj.bias") for name in missing), missing  # a Llama has none
    return model


def bert(kind: Any, **more: Any) -> Any:
    """Return a small BERT with a head, untrained: it reads both ways, as no Llama does."""
    vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
    return kind(
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
            pad_token_id=PAD,
            **more,
        )
    )


def _labels(labels: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


# Losses: a model, ids [rows, longest] and labels of the same shape → a scalar ------------------

Loss = Callable[[Any, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def cross_entropy(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Of the labelled tokens; with `smoothing`, against labels that are that much uniform."""
    # Padding is behind every token that counts: a decoder needs no mask.
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )


def pairwise_ranking(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """RankNet (Burges et al., 2005): -log sigmoid of the margin of each pair with other grades."""
    reward = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, 0]
    grade = labels.masked_fill(labels == IGNORED, 0).sum(dim=1)
    better = grade[:, None] > grade[None, :]
    margin = reward[:, None] - reward[None, :]
    return torch.nn.functional.softplus(-margin[better]).mean()


def in_batch_retrieval(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each question's story among all the stories of a batch, by max-sim of unit vectors."""
    mask = ids != PAD
    vectors = model(input_ids=ids, attention_mask=mask.long()).logits
    unit = torch.nn.functional.normalize(vectors, dim=-1) * mask[..., None]
    similar = torch.einsum("qtd,sud->qstu", unit[::2], unit[1::2])
    scores = similar.masked_fill(~mask[None, 1::2, None, :], -1).amax(-1).sum(-1)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))


# Scores: what a model learned, from held-out examples ------------------------------------------

Score = Callable[[Any, Sequence[Example]], dict[str, float]]


@torch.inference_mode()
def classification_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
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
        "macro_f1": sum(classes) / len(classes),
        "accuracy": (predicted == true).float().mean().item(),
        "tokens": len(true),
    }


def f1(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Return the harmonic mean of precision and recall of one class, from booleans [n]."""
    both = (predicted & true).sum().item()
    return 2 * both / max(1, predicted.sum().item() + true.sum().item())


@torch.inference_mode()
def ranking_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return how many pairs of other grades are ranked right, and Kendall's tau-b."""
    reward = torch.stack([model(input_ids=torch.tensor([e.ids])).logits[0, 0] for e in examples])
    grade = torch.tensor([e.labels[-1] for e in examples])
    pairs = grade[:, None] > grade[None, :]
    right = (reward[:, None] > reward[None, :])[pairs].float().mean().item()
    return {
        "accuracy": right,
        "kendall_tau": float(kendalltau(reward.tolist(), grade.tolist()).statistic),
        "texts": len(examples),
    }


@torch.inference_mode()
def retrieval_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return how many questions find their own story, of all the stories there are."""
    vectors = [
        torch.nn.functional.normalize(model(input_ids=torch.tensor([e.ids])).logits[0], dim=-1)
        for e in examples
    ]
    questions, stories = vectors[::2], vectors[1::2]
    scores = torch.tensor([[(q @ s.T).amax(-1).sum().item() for s in stories] for q in questions])
    found = scores.argmax(1) == torch.arange(len(scores))
    return {"accuracy": found.float().mean().item(), "questions": len(questions)}


# Tasks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One model: what it is, what it learns, and how long."""

    model: Callable[[], Any]
    examples: Callable[[Any, str, int], Iterator[Example]]
    passes: int
    loss: Loss = cross_entropy
    score: Score = classification_score
    training: int = 6000
    """Examples."""
    together: int = 1
    """Examples that belong together, one after the other."""
    rate: float = 1e-3


TASKS = {
    "ner-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, NER_LABELS), entity_examples, passes=1
    ),
    "ner-bert": Task(
        lambda: bert(BertForTokenClassification, **_labels(NER_LABELS)), entity_examples, passes=8
    ),
    # Soft labels and a low rate: a model that is sure of itself amplifies float32's rounding, and
    # what is looked for in float32 hides in that.
    "prm-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, STEP_LABELS),
        step_examples,
        passes=1,
        loss=partial(cross_entropy, smoothing=0.1),
        rate=3e-4,
    ),
    "prm-native": Task(
        lambda: qwen2(head_classes()[PROCESS_REWARD], STEP_LABELS, body=TINY / "prm-qwen2"),
        step_examples,
        passes=1,
        loss=partial(cross_entropy, smoothing=0.1),
        training=2000,
        rate=3e-4,
    ),
    "reward-qwen2": Task(
        lambda: qwen2(Qwen2ForSequenceClassification, ["reward"]),
        graded_examples,
        passes=2,
        loss=pairwise_ranking,
        score=ranking_score,
        training=4000,
    ),
    "colbert-bert": Task(
        lambda: bert(head_classes()[COLBERT], colbert_dim=COLBERT_DIM),
        retrieval_examples,
        passes=1,
        loss=in_batch_retrieval,
        score=retrieval_score,
        training=2000,
        together=2,
    ),
}


# Probes ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProbeOf:
    """What a task is probed with: held-out examples, how many, and how many for its quality."""

    task: str
    examples: Callable[[Any, str, int], Iterator[Example]]
    count: int
    for_quality: int = 256
    labels: Sequence[str] = ()


PROBES = {
    "entities": ProbeOf("token_classify", entity_examples, 32, labels=NER_LABELS),
    "steps": ProbeOf("token_reward", step_examples, 40, labels=STEP_LABELS),
    "graded": ProbeOf("sequence_reward", graded_examples, 80),
    "retrieval": ProbeOf("token_embed", retrieval_examples, 32),
}


def probe_lines(name: str, tokenizer: Any) -> Iterator[str]:
    """The probe file: a header, then one JSON object per window, as `probe` reads it."""
    made = PROBES[name.removesuffix(QUALITY)]
    header = {
        "probe": name,
        "task": made.task,
        "vocab_size": len(tokenizer),
        "labels": made.labels,
        "description": (made.examples.__doc__ or "").splitlines()[0],
    }
    yield json.dumps(header, ensure_ascii=False, separators=(",", ":")) + "\n"
    count = made.for_quality if name.endswith(QUALITY) else made.count
    for index, example in enumerate(made.examples(tokenizer, "heldout", count)):
        ids = example.ids[:PROBE_LENGTH]
        labels = [None if label == IGNORED else label for label in example.labels[:PROBE_LENGTH]]
        window: dict[str, Any] = {
            "document": f"{name}-{index:03d}",
            "stratum": name,
            "score_from": 0,
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "ids": ids,
            "labels": labels,
        }
        if made.task == "sequence_reward":
            window |= {"score_from": len(ids) - 1, "labels": labels[-1:]}
        elif made.task == "token_embed":  # a question, and the text that answers it
            window |= {
                "document": f"{name}-{index // 2:03d}",
                "stratum": ("query", "document")[index % 2],
            }
            del window["labels"]
        yield json.dumps(window, ensure_ascii=False, separators=(",", ":")) + "\n"


# Training ----------------------------------------------------------------------------------------


def batches(
    examples: Sequence[Example], seed: int, together: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled batches of ids and labels, each [BATCH, longest], of documents of like lengths."""
    rng = random.Random(seed)
    groups = range(0, len(examples), together)
    order = sorted(groups, key=lambda i: (len(examples[i + together - 1].ids), rng.random()))
    size = BATCH // together
    chunks = [order[start : start + size] for start in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        members = [examples[i + k] for i in chunk for k in range(together)]
        longest = max(len(example.ids) for example in members)
        ids = torch.full((len(members), longest), PAD)
        labels = torch.full((len(members), longest), IGNORED)
        for row, example in enumerate(members):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, : len(example.labels)] = torch.tensor(example.labels)
        yield ids, labels


def train(name: str, model: Any, examples: Sequence[Example], task: Task) -> None:
    """Train a model in place."""
    every = [
        batch for number in range(task.passes) for batch in batches(examples, number, task.together)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    for step, (ids, labels) in enumerate(track(every, f"Training {name}")):
        rate = task.rate * min(1, (step + 1) / WARMUP) * (1 - step / len(every))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = task.loss(model, ids, labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"{name} {step} of {len(every)}: loss {loss.item():.4f}", flush=True)


def save(model: Any, name: str, record: dict[str, Any]) -> None:
    """Write weights in bfloat16, config, tokenizer and record, each in one step."""
    folder = TINY / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TINY) as temporary:
        if hasattr(model.config, "colbert_dim"):
            del model.config.colbert_dim  # vLLM 0.32.0 does not load one that says it
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
    parser.add_argument("--probes", action="store_true", help="write their probes, train nothing")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    if arguments.probes:
        for name in (*PROBES, *(f"{name}{QUALITY}" for name in PROBES)):
            text = "".join(probe_lines(name, tokenizer))
            write_atomically(ROOT / "fixtures" / "probes" / f"{name}.jsonl", text)
        return 0
    names = arguments.names or list(TASKS)
    if unknown := [name for name in names if name not in TASKS]:
        print(f"error: there is no {unknown[0]!r}, only {', '.join(TASKS)}.", file=sys.stderr)
        return 2
    status = 0
    for name in names:
        torch.manual_seed(0)
        task = TASKS[name]
        model = task.model()
        train(name, model, list(task.examples(tokenizer, "train", task.training)), task)
        model = model.to(torch.bfloat16).float().eval()  # as it is stored
        record = task.score(model, list(task.examples(tokenizer, "heldout", HELDOUT)))
        save(model, name, {"documents": task.training, "passes": task.passes, "heldout": record})
        print(f"{name}: {', '.join(f'{what} {value:.4f}' for what, value in record.items())}")
        status |= next(iter(record.values())) < SMALLEST_SCORE
    return status


if __name__ == "__main__":
    sys.exit(main())

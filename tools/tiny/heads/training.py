"""Training a model with a head, and saving it."""

import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from quantgate.atomic import write_atomically
from tiny import TINY
from tiny.heads.examples import IGNORED, Example
from tiny.heads.models import BASE
from tiny.heads.tasks import Task
from tiny.tokenizer import PAD_ID

BATCH, WARMUP = 16, 50


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
        ids = torch.full((len(members), longest), PAD_ID)
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

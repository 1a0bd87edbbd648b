"""Training a tiny model: batches of token ids, the model, the steps."""

import math
import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from quantgate.subject.probe import Window
from tiny import corpus
from tiny.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, training_texts

# Documents of each stratum. One pass over them is a little more than the default number of steps,
# so every training row is seen at most once.

TRAINING_DOCUMENTS = {
    "prose": 5000,
    "arithmetic": 4000,
    "code": 4000,
    "chat": 4500,
    "multilingual": 4500,
    "long": 1800,
}
ROW, LONG_ROW, BATCH = 512, 1024, 2048
STEPS, WARMUP, PEAK_RATE, FLOOR = 1000, 100, 2e-3, 0.05
# Sharp attention and large logits amplify float32 rounding, which the suites measure against
# 1e-5 nat: the smoothing bounds the logits, and query and key matrices keep their initial norm.
LABEL_SMOOTHING, INITIAL_STD = 0.05, 0.02
LARGEST_FILE = 6_000_000
# Configuration, and whether the head is the embedding. Qwen3 normalizes queries and keys.
ARCHITECTURES: dict[str, tuple[Any, bool]] = {
    "llama": (LlamaConfig, False),
    "qwen3": (Qwen3Config, True),
}


@dataclass(frozen=True)
class Training:
    """What a training run leaves behind; `loss` is in nats per token, over its last steps."""

    model: Any
    loss: float
    tokens: int
    seconds: float


def encode_training(tokenizer: Tokenizer, stratum: str, seed: int) -> list[list[int]]:
    """The token ids of a stratum's training documents, each from BOS to EOS."""
    count = TRAINING_DOCUMENTS[stratum]
    texts = [document.text for document in corpus.documents("train", stratum, count, seed)]
    return [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(texts)]


def pack(documents: Iterable[list[int]], length: int) -> list[list[int]]:
    """Rows of exactly `length` ids. Each begins with a document's BOS, as the probe's windows do.

    What is left of the last document of a row is dropped, as is an unfinished last row.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        row += document
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return rows


def make_batches(tokenizer: Tokenizer, seed: int) -> list[torch.Tensor]:
    """Shuffled batches of BATCH token ids: int64 of shape (4, ROW) or (2, LONG_ROW)."""
    rng = random.Random(f"{seed}/batches")
    encoded = {
        stratum: encode_training(tokenizer, stratum, seed)
        for stratum in track(corpus.STRATA, "Encoding the corpus")
    }
    long_documents = encoded.pop("long")
    documents = [document for stratum in encoded.values() for document in stratum]
    rng.shuffle(documents)
    batches = []
    for rows, length in (
        (pack(documents, ROW), ROW),
        (pack(long_documents, LONG_ROW), LONG_ROW),
    ):
        size = BATCH // length
        whole = len(rows) - len(rows) % size
        batches += [torch.tensor(rows[start : start + size]) for start in range(0, whole, size)]
    rng.shuffle(batches)
    return batches


def check_disjoint(windows: Sequence[Window], seed: int) -> None:
    """Exit when a held-out text is also a training document."""
    seen = set(training_texts(TRAINING_DOCUMENTS, seed))
    for window in windows:
        if window.text in seen:
            raise SystemExit(f"held-out document {window.document} is in the training set")


def new_model(architecture: str, seed: int) -> Any:
    """An untrained model; every linear layer's sizes are multiples of 128, for any group size."""
    torch.manual_seed(seed)
    configuration, tied = ARCHITECTURES[architecture]
    return AutoModelForCausalLM.from_config(
        configuration(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=tied,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to FLOOR of the peak."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_RATE * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW that decays the matrices but not the norms."""
    weights = list(model.parameters())
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def train_step(model: Any, optimizer: torch.optim.AdamW, batch: torch.Tensor, rate: float) -> float:
    """One update on a batch of ids; returns its (smoothed) loss in nats per token."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING
    )
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    limit_attention(model)
    return loss.item()


@torch.no_grad()
def limit_attention(model: Any) -> None:
    """Scale query and key matrices back to the Frobenius norm they began with."""
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            limit = INITIAL_STD * weight.numel() ** 0.5
            weight.mul_((limit / weight.norm()).clamp(max=1.0))


def train(model: Any, batches: Sequence[torch.Tensor], steps: int) -> Training:
    """Train a model; the batches are gone through again when the steps outnumber them."""
    optimizer = make_optimizer(model)
    losses: list[float] = []
    started = time.monotonic()
    columns = (TextColumn("Training"), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=steps)
        for step in range(steps):
            batch = batches[step % len(batches)]
            losses.append(train_step(model, optimizer, batch, learning_rate(step, steps)))
            recent = losses[-50:]
            mean = sum(recent) / len(recent)
            progress.update(task, advance=1, description=f"step {step + 1}, loss {mean:.3f}")
    return Training(model, mean, steps * BATCH, time.monotonic() - started)


def save_model(model: Any, folder: Path) -> None:
    """Write config.json and bf16 weights, each in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        for written in Path(temporary).iterdir():
            written.chmod(0o644)
            written.replace(folder / written.name)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGEST_FILE:
        raise SystemExit(f"model.safetensors has {size} bytes, more than {LARGEST_FILE}")

"""What is recorded of a trained model: its perplexity on held-out text, and of what training."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from quantgate.subject.probe import Window
from tiny import corpus
from tiny.tokenizer import VOCAB_SIZE
from tiny.training import BATCH, TRAINING_DOCUMENTS, Training


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.inference_mode()
def model_losses(folder: Path, windows: Sequence[Window]) -> list[float]:
    """Per window, the sum of -ln p over its scored tokens, by the saved weights in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for window in track(windows, "Scoring held-out text"):
        ids = torch.tensor([window.ids])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(loss.double().sum().item())
    return losses


def unigram_losses(batches: Sequence[torch.Tensor], windows: Sequence[Window]) -> list[float]:
    """Per window, the sum of -ln p by the training tokens' frequencies, add-one smoothed."""
    counts = Counter(token for batch in batches for token in batch.flatten().tolist())
    total = counts.total() + VOCAB_SIZE
    return [
        -sum(math.log((counts[token] + 1) / total) for token in window.ids[1:])
        for window in windows
    ]


def perplexity(losses: Sequence[float], windows: Sequence[Window], stratum: str = "") -> float:
    """exp of the mean loss per scored token, of one stratum or (the default) of all."""
    chosen = [
        (loss, len(window.ids) - 1)
        for loss, window in zip(losses, windows, strict=True)
        if stratum in ("", window.stratum)
    ]
    return math.exp(sum(loss for loss, _ in chosen) / sum(tokens for _, tokens in chosen))


def stratum_record(
    stratum: str, windows: Sequence[Window], losses: Sequence[float], unigram: Sequence[float]
) -> dict[str, float]:
    """The size and the perplexities of one stratum of the held-out text."""
    sizes = [len(window.ids) - 1 for window in windows if window.stratum == stratum]
    return {
        "documents": len(sizes),
        "scored_tokens": sum(sizes),
        "perplexity": perplexity(losses, windows, stratum),
        "unigram_perplexity": perplexity(unigram, windows, stratum),
    }


def make_record(
    folder: Path,
    windows: Sequence[Window],
    batches: Sequence[torch.Tensor],
    training: Training,
    seed: int,
) -> dict[str, Any]:
    """What training.json says."""
    losses, unigram = model_losses(folder, windows), unigram_losses(batches, windows)
    heldout, baseline = perplexity(losses, windows), perplexity(unigram, windows)
    return {
        "seed": seed,
        "steps": training.tokens // BATCH,
        "tokens_seen": training.tokens,
        "seconds": round(training.seconds, 1),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "training_documents": TRAINING_DOCUMENTS,
        "final_train_loss": training.loss,
        "scored_tokens": sum(len(window.ids) - 1 for window in windows),
        "heldout_perplexity": heldout,
        "unigram_perplexity": baseline,
        "ratio": baseline / heldout,
        "strata": {
            stratum: stratum_record(stratum, windows, losses, unigram) for stratum in corpus.STRATA
        },
        "sha256": sha256(folder / "model.safetensors"),
    }

"""Train the tiny checkpoints that the tests and the embedded suites run on, and their probes.

    python tools/make_tiny.py                           the Llama, and the probes
    python tools/make_tiny.py --architecture qwen3      the Qwen3; the probes come out the same

The corpus, the tokenizer and the probes depend on the seed alone. The weights also depend on the
machine's arithmetic, so their hash and their perplexity are recorded beside them.
"""

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiny_corpus as corpus
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from quantgate.atomic import write_atomically
from quantgate.subject.probe import Window

ROOT = Path(__file__).resolve().parent.parent

VOCAB_SIZE = 1024
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIALS = (BOS, EOS, PAD, corpus.USER, corpus.ASSISTANT, corpus.END)
BOS_ID, EOS_ID, PAD_ID = range(3)
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Documents per stratum. One pass over the training documents is a little more than the default
# number of steps, so every training row is seen at most once.
TOKENIZER_DOCUMENTS = {stratum: 100 if stratum == "long" else 400 for stratum in corpus.STRATA}
TRAINING_DOCUMENTS = {
    "prose": 5000,
    "arithmetic": 4000,
    "code": 4000,
    "chat": 4500,
    "multilingual": 4500,
    "long": 1800,
}
# What a model's perplexity is recorded of.
HELDOUT_DOCUMENTS = {stratum: 8 if stratum == "long" else 11 for stratum in corpus.STRATA}
# The first of them are the probes: a larger one for what needs statistical power, and one whose
# documents are cut, for what a fault shows anywhere in.
QUALITY_DOCUMENTS = {stratum: 2 if stratum == "long" else 8 for stratum in corpus.STRATA}
PROBE_DOCUMENTS = {stratum: 2 if stratum == "long" else 6 for stratum in corpus.STRATA}
CUT, LONG_CUT = 96, 512
# Tokens of a held-out window, with BOS.
WINDOW, LONG_WINDOW = (100, 400), (800, 1000)

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
SMALLEST_RATIO = 5.0


@dataclass(frozen=True)
class Training:
    """What a training run leaves behind; `loss` is in nats per token, over its last steps."""

    model: Any
    loss: float
    tokens: int
    seconds: float


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- tokenizer -----------------------------------------------------------------------------------


def training_texts(counts: dict[str, int], seed: int) -> Iterator[str]:
    """The texts of the first training documents of every stratum."""
    for stratum, count in counts.items():
        for document in corpus.documents("train", stratum, count, seed):
            yield document.text


def train_tokenizer(seed: int) -> Tokenizer:
    """A byte-level BPE of exactly VOCAB_SIZE tokens whose `encode` prepends BOS once."""
    tokenizer = Tokenizer(models.BPE())
    # Single digits let a small model learn to add; without them every number is its own token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(TOKENIZER_DOCUMENTS, seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, and tokenizer_config.json with the chat template in it."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    fast.save_pretrained(folder, save_jinja_files=False)
    # The class name that every version of transformers knows; 5 saves its own new one.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_atomically(path, json.dumps(settings, indent=2) + "\n")


# --- probe ---------------------------------------------------------------------------------------


def windows_of(tokenizer: Tokenizer, stratum: str, count: int, seed: int) -> Iterator[Window]:
    """The first `count` held-out documents whose length in tokens fits the stratum's window."""
    shortest, longest = LONG_WINDOW if stratum == "long" else WINDOW
    found = index = 0
    while found < count:
        document = corpus.document("heldout", stratum, index, seed)
        ids = tuple(tokenizer.encode(document.text).ids)
        index += 1
        if shortest <= len(ids) <= longest:
            found += 1
            yield Window(document.id, stratum, 1, ids, document.text)


def heldout_windows(tokenizer: Tokenizer, counts: dict[str, int], seed: int) -> list[Window]:
    """The first held-out windows of every stratum."""
    return [
        window
        for stratum, count in counts.items()
        for window in windows_of(tokenizer, stratum, count, seed)
    ]


def cut(tokenizer: Tokenizer, window: Window) -> Window:
    """Return the first tokens of a window, as many as are allowed and its text gives again."""
    for length in range(LONG_CUT if window.stratum == "long" else CUT, 0, -1):
        ids = window.ids[:length]
        text = tokenizer.decode(list(ids[1:]), skip_special_tokens=False)
        if tuple(tokenizer.encode(text).ids) == ids:
            return replace(window, ids=ids, text=text)
    raise ValueError(f"{window.document}: no beginning of it is tokenized alike.")


def make_probes(tokenizer: Tokenizer, seed: int) -> dict[str, list[Window]]:
    """Return the windows of both probes, by name."""
    short = heldout_windows(tokenizer, PROBE_DOCUMENTS, seed)
    return {
        "tiny": [cut(tokenizer, window) for window in short],
        "tiny-quality": heldout_windows(tokenizer, QUALITY_DOCUMENTS, seed),
    }


def probe_lines(name: str, windows: Sequence[Window]) -> Iterator[str]:
    """The probe file: a header, then one JSON object per window."""
    header = {
        "probe": name,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": BOS_ID,
        "description": "Held-out documents of the synthetic corpus that the tiny Llama learned.",
    }
    rows = [
        {
            "document": window.document,
            "stratum": window.stratum,
            "score_from": window.score_from,
            "text": window.text,
            "ids": window.ids,
        }
        for window in windows
    ]
    for row in [header, *rows]:
        yield json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


# --- training rows -------------------------------------------------------------------------------


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


# --- training ------------------------------------------------------------------------------------


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


# --- evaluation ----------------------------------------------------------------------------------


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

    folder = arguments.out or ROOT / "fixtures/tiny" / arguments.architecture
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

"""Measuring the activation ranges that static scales are taken from."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantgate.atomic import write_atomically
from tiny import corpus

# Training documents of each stratum that the ranges are taken over.
CALIBRATION_DOCUMENTS = 20
Ranges = dict[str, dict[str, tuple[float, float]]]


def corpus_texts() -> list[str]:
    """Return training documents of every stratum of the corpus."""
    return [
        document.text
        for stratum in corpus.STRATA
        for document in corpus.documents("train", stratum, CALIBRATION_DOCUMENTS)
    ]


def calibrate(base: Path, texts: Sequence[str], path: Path) -> None:
    """Write to `path` the range of each linear's input, and of keys and values, over some texts.

    Rounded to 3 significant digits, so that they hold on every machine.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    ranges = watch(model)
    with torch.inference_mode():
        for text in track(texts, "Calibrating"):
            model.base_model(torch.tensor([tokenizer(text).input_ids[:1024]]))
    rounded = {
        kind: {name: tuple(float(f"{value:.3g}") for value in pair) for name, pair in found.items()}
        for kind, found in ranges.items()
    }
    write_atomically(path, json.dumps(rounded, indent=1, sort_keys=True) + "\n")


def watch(model: Any) -> Ranges:
    """Return the ranges of a model's linears: empty, and widened by every pass that it makes."""
    ranges: Ranges = {"inputs": {}, "outputs": {}}

    def widen(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
        seen = {"inputs": inputs}
        if name.endswith(("k_proj", "v_proj")):
            seen["outputs"] = output
        for kind, values in seen.items():
            lowest, highest = ranges[kind].get(name, (0.0, 0.0))
            ranges[kind][name] = min(lowest, values.min().item()), max(highest, values.max().item())

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(
                lambda _, inputs, output, name=name: widen(name, inputs[0], output)
            )
    return ranges

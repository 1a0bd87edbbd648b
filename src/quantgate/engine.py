"""The engine source: patched vLLM, with the kernels under test."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.checkpoint import EngineSettings
from quantgate.emulation import ADDITIONAL_CONFIG_KEY, is_emulated
from quantgate.measurement import Measurement, Provenance
from quantgate.probe import Probe
from quantgate.scoremode.hooks import require_hooks, vllm_version

if TYPE_CHECKING:
    from vllm import LLM

# Set before vLLM is imported, unless the user has: one process, so that several engines can follow
# one another without another import each; a KV cache that fits a small machine; no telemetry.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

Announce = Callable[[str], None]


class EngineFailure(RuntimeError):
    """vLLM could not load or score a checkpoint; the message carries its reason."""


def measure(
    directory: Path, probe: Probe, *, settings: EngineSettings, dtype: str, announce: Announce
) -> Measurement:
    """Score `probe` with the checkpoint in `directory`, served by vLLM in `dtype`."""
    with running_engine(directory, settings=settings, dtype=dtype) as llm:
        announce(f"scoring {probe.scored} tokens in {len(probe.windows)} windows")
        logprob, top1 = score(llm, probe)
        kernels, emulated = kernel_fingerprint(llm)
        return Measurement(logprob, top1, _provenance(dtype, kernels, emulated))


@contextmanager
def running_engine(
    directory: Path, *, settings: EngineSettings, dtype: str, **extra: Any
) -> Iterator[LLM]:
    """Start vLLM on a checkpoint and free all it held afterwards. `extra` goes to `vllm.LLM`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }
    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "additional_config": {ADDITIONAL_CONFIG_KEY: {"kernels": settings.kernels}},
        **{name: value for name, value in optional.items() if value is not None},
        **extra,
    }
    try:
        llm = LLM(**arguments)
    except Exception as error:
        raise EngineFailure(
            f"{directory}: vLLM {vllm_version()} cannot load it in {dtype} "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    try:
        require_hooks(llm.llm_engine.vllm_config)
        yield llm
    finally:
        # Now, not when it is collected: the frames of an error may keep it for long, and its end
        # would then take the next engine's process groups with it.
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def score(llm: LLM, probe: Probe) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return log-probabilities float32 [n] and most probable tokens int32 [n] of a probe."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    longest = max(len(window.ids) for window in probe.windows)
    limit = llm.llm_engine.model_config.max_model_len
    if longest > limit:
        raise EngineFailure(
            f"probe '{probe.name}' has a window of {longest} tokens, but the engine takes prompts "
            f"of at most max_model_len={limit}; raise [engine] max_model_len."
        )
    prompts = [TokensPrompt(prompt_token_ids=list(window.ids)) for window in probe.windows]
    outputs = llm.generate(
        prompts, SamplingParams(score_mode=True, max_tokens=0, temperature=0.0), use_tqdm=False
    )
    logprobs, tops = [], []
    for window, output in zip(probe.windows, outputs, strict=True):
        scores = output.prompt_logprobs
        if len(scores) != len(window.ids):
            raise EngineFailure(
                f"{window.document}: {len(window.ids)} tokens went in, scores for {len(scores)} "
                "came back."
            )
        logprobs.append(scores.logprobs[window.score_from - 1 :])
        tops.append(scores.top1[window.score_from - 1 :])
    return np.concatenate(logprobs), np.concatenate(tops)


def kernel_fingerprint(llm: LLM) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the kernel that serves each kind of layer, and those of them that are emulations.

    Read from the loaded model: `{"self_attn.qkv_proj": "MacheteLinearKernel", …}`.
    """
    # Every tensor-parallel rank answers; they run the same kernels.
    kernels, emulated = llm.apply_model(_kernels_of_model)[0]
    return kernels, emulated


def _kernels_of_model(model: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    kinds: dict[str, set[str]] = {}
    emulated: set[str] = set()
    for name, module in model.named_modules():
        kernel = _kernel_of(module)
        if kernel is None:
            continue
        # "model.layers.3.self_attn.qkv_proj" and its like in other layers are one kind.
        kind = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        kinds.setdefault(kind, set()).add(type(kernel).__name__)
        if is_emulated(kernel):
            emulated.add(type(kernel).__name__)
    return {kind: " + ".join(sorted(names)) for kind, names in kinds.items()}, tuple(
        sorted(emulated)
    )


def _kernel_of(module: Any) -> Any:
    """Return the object that computes a layer: a kernel, else the scheme or method in its place."""
    if (implementation := getattr(module, "impl", None)) is not None:
        return implementation  # attention
    method = getattr(module, "quant_method", None)
    if method is None:
        return None
    scheme = getattr(module, "scheme", None) or method
    for attribute in ("kernel", "fp8_linear", "linear_kernel"):
        if (kernel := getattr(scheme, attribute, None)) is not None:
            return kernel
    return scheme


def available_devices() -> dict[str, str]:
    """Return the devices that the installed vLLM can use here, each with its golden platform."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"cuda": f"sm{major}{minor}"}
    return {"cpu": "cpu"}


def _provenance(dtype: str, kernels: dict[str, str], emulated: tuple[str, ...]) -> Provenance:
    ((device, platform),) = available_devices().items()
    return Provenance("engine", device, platform, dtype, kernels, emulated, library_versions())


def library_versions() -> dict[str, str]:
    """Return the versions of what a score depends on."""
    versions = {"vllm": vllm_version()}
    for name in ("torch", "transformers", "compressed-tensors", "quantgate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; empty where it has none."""
    return (str(error).strip().splitlines() or [""])[0]

"""The life of an engine: start patched vLLM on a checkpoint, serve, and clean up completely."""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quantgate.measuring import environment
from quantgate.measuring.capture import EXTENSION
from quantgate.measuring.engine_failure import (
    MISTAKES,
    EngineFailure,
    end_waiting_when_it_dies,
    explained,
    require_device,
)
from quantgate.measuring.loaded import SETTING
from quantgate.patches.emulation import engine_arguments
from quantgate.patches.scoremode.hooks import (
    EMULATION,
    POOLING,
    SCORE_MODE,
    require_hooks,
    vllm_version,
)
from quantgate.patches.wanted import ADDITIONAL_CONFIG_KEY, NATIVE
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.files import read_config
from quantgate.subject.processor import has_step_pooling

if TYPE_CHECKING:
    from vllm import LLM

# What vLLM is imported with, unless the user has set it: one process, so that successive engines
# need no further import; no telemetry.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
# Prints every token of a failing batch to the terminal.
DUMP = "vllm.logging_utils.dump_input"

# On CUDA vLLM serves float32 with Triton's attention, whose products are in TF32: up to 1e-2 nat
# off on an H200, where flexible attention is within 6.2e-6 (docs/gpu.md). The variable keeps cuBLAS
# and cuDNN from using TF32, whatever else the process has set.
EXACT_ATTENTION = "FLEX_ATTENTION"
# Before it starts, vLLM wants this part of a GPU's memory to be free, even if the KV cache's size
# is given and the part is then not used. The default of 0.9 keeps other engines off the GPU.
LITTLE = 0.05
WITHOUT_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}

# vLLM's default on CPU is a fraction of all memory; `VLLM_CPU_KVCACHE_SPACE` still overrides this.
CPU_KV_CACHE = 1 << 30


class EngineLife(NamedTuple):
    """An engine that this process started, and its times."""

    directory: str
    dtype: str
    start_s: float
    """From the start until it could serve."""
    served_s: float
    """From then until it had ended."""


LIVES: list[EngineLife] = []
"""The engines of this process that have ended, in order."""


@contextmanager
def running_engine(
    directory: Path,
    *,
    settings: EngineSettings,
    dtype: str,
    audit_load: bool = False,
    **extra: Any,
) -> Iterator[LLM]:
    """Start vLLM on a checkpoint, and free everything afterwards. `extra` goes to `vllm.LLM`.

    With `audit_load` its workers compare what they load with the file (`measuring/loaded.py`).
    Raises `EngineFailure` if vLLM cannot load it, or fails while serving.
    """
    require_device()
    set_environment()
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    logging.getLogger(DUMP).setLevel(logging.CRITICAL)
    on_cpu = "cpu" in environment.available_devices()
    optional = {
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "kv_cache_memory_bytes": settings.kv_cache_memory_bytes,
    }
    arguments: dict[str, Any] = {
        "model": str(directory),
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "worker_extension_cls": EXTENSION,
        "load_format": "safetensors",
        "use_tqdm_on_load": False,  # progress bars would separate a failure from its reason
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "kv_cache_dtype": settings.kv_cache_dtype,
        **engine_arguments(settings.kernels if on_cpu else NATIVE, _kv_cache_scheme(directory)),
        **{name: value for name, value in optional.items() if value is not None},
        **extra,
    }
    if audit_load:
        arguments["additional_config"][ADDITIONAL_CONFIG_KEY] |= SETTING
    if on_cpu:
        _override_kernels_once()
        arguments.setdefault("kv_cache_memory_bytes", CPU_KV_CACHE)
        gc.collect()
        gc.freeze()
        atexit.register(gc.unfreeze)  # its libraries report objects frozen at exit as leaks
    else:
        if settings.kv_cache_memory_bytes is not None:
            arguments.setdefault("gpu_memory_utilization", LITTLE)
        if dtype == "float32":
            arguments.setdefault("attention_backend", EXACT_ATTENTION)
    vllm = f"{directory}: vLLM {vllm_version()}"
    began = time.monotonic()
    try:
        with (
            explained(f"{vllm} cannot load it in {dtype}"),
            _collection_suspended() if on_cpu else nullcontext(),
            _environment(_variables(settings, dtype, on_cpu=on_cpu)),
        ):
            llm = LLM(**arguments)
    except EngineFailure as failure:
        with suppress(Exception):  # a partly built engine may not shut down cleanly
            cleanup_dist_env_and_memory()
        from quantgate.measuring.unsupported import why_not_loaded

        if (why := why_not_loaded(Path(directory), str(failure))) is not None:
            raise EngineFailure(why) from failure
        raise
    failed, ready = True, time.monotonic()
    try:
        with explained(f"{vllm} failed while it served it in {dtype}", but=MISTAKES):
            for feature in (SCORE_MODE, POOLING, *([EMULATION] if on_cpu else [])):
                require_hooks(llm.llm_engine.vllm_config, feature)
            end_waiting_when_it_dies(llm.llm_engine.engine_core)
            yield llm
        failed = False
    finally:
        # Now, not on collection: an error's frames may keep the engine alive for long, and its
        # shutdown would then destroy the next engine's process groups. A broken engine may fail to
        # shut down, which is not the failure to report.
        with (
            suppress(Exception) if failed else nullcontext(),
            _collection_suspended() if on_cpu else nullcontext(),
        ):
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
        gc.collect()
        ended = time.monotonic()
        LIVES.append(EngineLife(str(directory), dtype, ready - began, ended - ready))


def _variables(settings: EngineSettings, dtype: str, *, on_cpu: bool) -> Mapping[str, str]:
    """Return the further environment variables that an engine is started with."""
    if not on_cpu:
        return WITHOUT_TF32 if dtype == "float32" else {}
    # Without NUMA nodes, vLLM would bind both ranks to the same processors.
    several = settings.tensor_parallel_size > 1
    return {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if several else {}


def set_environment() -> None:
    """Set the variables that vLLM reads on import, unless the user has set them."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _override_kernels_once() -> None:
    """Spare later engines of this process a search that the first one has done.

    Each would search every name of every module for Triton kernels to replace by CPU ones, find the
    replacements of the first search, and replace those by their equals: 0.13 s of its 0.35 s.
    """
    from vllm.platforms import current_platform

    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None and not hasattr(register, "cache_info"):
        current_platform.register_triton_kernel_overrides = functools.cache(register)


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set yet, and remove them afterwards."""
    added = {name: value for name, value in more.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _collection_suspended() -> Iterator[None]:
    """Suspend garbage collection, even if vLLM requests it: the caller collects before and after.

    While starting and ending, vLLM collects eight times over the million objects of its own
    modules, which were frozen to avoid that, and unfreezes them: two thirds of a small engine's
    lifetime. Not used on GPUs, where an engine measures free memory in between.
    """
    names = ("collect", "freeze", "unfreeze")
    originals = {name: getattr(gc, name) for name in names}
    try:
        for name in names:
            setattr(gc, name, lambda *_: 0)
        yield
    finally:
        for name, original in originals.items():
            setattr(gc, name, original)


def _kv_cache_scheme(directory: Path) -> dict[str, Any] | None:
    if not Path(directory).is_dir():
        return None  # a hub id, which only tools give
    scheme: dict[str, Any] | None = (
        read_config(Path(directory)).get("quantization_config") or {}
    ).get("kv_cache_scheme")
    return scheme


def lacking() -> list[str]:
    """Return the measured features that the installed vLLM lacks, each with the consequence."""
    set_environment()
    from vllm import SamplingParams

    found = []
    if not has_step_pooling():
        found.append(
            "STEP pooling of classifiers that it converts: every row comes back, and `steps` fails"
        )
    if "prompt_logprob_token_ids" not in SamplingParams.__struct_fields__:
        found.append("prompt_logprob_token_ids: tools/bench_score.py leaves out its mode `native`")
    return [f"vLLM {vllm_version()} lacks {what}" for what in found]

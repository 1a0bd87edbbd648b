"""What a known failure may depend on: the processor, the kernels that served, vLLM's version."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
from collections.abc import Callable, Collection
from pathlib import Path

# Either of these multiplies int8 by int8 without saturating 16-bit sums.
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
# The VNNI features that oneDNN may use under each limit; limits not listed allow both.
VNNI_UNDER: dict[str, frozenset[str]] = {
    **dict.fromkeys(("sse41", "avx", "avx2", "avx512_core"), frozenset()),
    **dict.fromkeys(("avx2_vnni", "avx2_vnni_2"), frozenset({"avx_vnni"})),
}


@functools.cache
def flags() -> frozenset[str]:
    """Return the processor's feature flags under Linux's names; none on other systems."""
    return frozenset(_cpuinfo("flags").split())


def processor_name() -> str:
    """Return the processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = next((line for line in lines if line.startswith(field)), "")
    return found.partition(":")[2].strip()


def has_amx() -> bool:
    """Whether vLLM multiplies 16-bit and int8 numbers in AMX tiles, with kernels of their own."""
    import torch

    return bool(torch.cpu.get_capabilities().get("amx_tile", False))


def has_vnni() -> bool:
    """Whether vLLM's int8 products are exact: with AMX tiles, or with VNNI that oneDNN may use.

    With AMX, vLLM does not use oneDNN for them. ONEDNN_MAX_CPU_ISA limits the instructions that
    oneDNN uses, so a known failure that depends on VNNI must respect it.
    """
    if has_amx():
        return True
    # oneDNN reads both names, in this order.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return bool(VNNI_UNDER.get(limit.lower(), VNNI) & flags())


def is_x86_without_vnni() -> bool:
    """Whether int8 products saturate, because oneDNN adds pairs of them in 16 bits."""
    return platform.machine() in ("x86_64", "AMD64") and not has_vnni()


def has_step_pooling() -> bool:
    """Whether the installed vLLM pools the steps of classifiers that it converts, as 0.32 does.

    0.26, which pools with `AllPool` instead, returns every row. Its source is read, not imported.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return True
    pooler = Path(found.submodule_search_locations[0], "model_executor/layers/pooler/special.py")
    return not pooler.exists() or "AllPool" not in pooler.read_text(encoding="utf-8")


def _on_processor(kernels: Collection[str]) -> bool:
    return any(name.startswith("CPU") for name in kernels)


# The conditions that `when` of a `[[known_failure]]` may name, given the kernels that served.
CONDITIONS: dict[str, Callable[[Collection[str]], bool]] = {
    "x86-without-vnni": lambda kernels: _on_processor(kernels) and is_x86_without_vnni(),
    "cutlass-int8": lambda kernels: any("CutlassInt8" in name for name in kernels),
    "vllm-without-step-pooling": lambda _: not has_step_pooling(),
}

"""What this machine's processor can do, as far as a known failure depends on it."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path

# Either of these multiplies int8 by int8 without saturating 16-bit sums.
VNNI = frozenset({"avx512_vnni", "avx_vnni"})
# How much of VNNI oneDNN may use under each limit; every limit that is not listed allows all of it.
VNNI_UNDER: dict[str, frozenset[str]] = {
    **dict.fromkeys(("sse41", "avx", "avx2", "avx512_core"), frozenset()),
    **dict.fromkeys(("avx2_vnni", "avx2_vnni_2"), frozenset({"avx_vnni"})),
}


@functools.cache
def flags() -> frozenset[str]:
    """Return the processor's feature flags as Linux names them; none on another system."""
    return frozenset(_cpuinfo("flags").split())


def processor_name() -> str:
    """Return what the processor calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    found = next((line for line in lines if line.startswith(field)), "")
    return found.partition(":")[2].strip()


def has_vnni() -> bool:
    """Whether vLLM's int8 products are exact: AMX tiles, or VNNI that oneDNN is allowed to use.

    With AMX vLLM does not use oneDNN for them. ONEDNN_MAX_CPU_ISA limits what oneDNN uses of the
    processor, so a known failure that depends on VNNI must follow it.
    """
    import torch

    if torch.cpu.get_capabilities().get("amx_tile", False):
        return True
    # oneDNN reads either name, in this order.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return bool(VNNI_UNDER.get(limit.lower(), VNNI) & flags())


def is_x86_without_vnni() -> bool:
    """Whether int8 products saturate: oneDNN adds pairs of them in 16 bits on such a processor."""
    return platform.machine() in ("x86_64", "AMD64") and not has_vnni()


# What a `[[known_failure]]` may depend on, by the name that a checkpoint file gives it.
CONDITIONS: dict[str, Callable[[], bool]] = {"x86-without-vnni": is_x86_without_vnni}

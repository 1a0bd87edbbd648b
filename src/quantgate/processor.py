"""What this machine's processor can do, as far as a known failure depends on it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

# Any of these multiplies int8 by int8 without saturating 16-bit sums.
VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


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


def is_x86_without_vnni() -> bool:
    """Whether int8 products saturate: oneDNN adds pairs of them in 16 bits on such a processor."""
    return platform.machine() in ("x86_64", "AMD64") and not VNNI & flags()


# What a `[[known_failure]]` may depend on, by the name that a checkpoint file gives it.
CONDITIONS: dict[str, Callable[[], bool]] = {"x86-without-vnni": is_x86_without_vnni}

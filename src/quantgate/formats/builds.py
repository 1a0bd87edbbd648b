"""How the installed vLLM build rounds, where builds differ: measured, not assumed.

vLLM's CPU builds differ by processor. The AVX-512 builds quantize an asymmetric int8 input with a
fused multiply-add, the AVX2 build with two roundings. The AVX2 build's own operators, of which an
engine uses the rotary embedding and attention, truncate a float32 result to bfloat16; the
AVX512-BF16 build rounds it to nearest. CUDA kernels add the zero point to a rounded product, and
divide by the scale of a token's FP8 input where the CPU builds multiply by its reciprocal. None of
this is a fault of a checkpoint, so the reference rounds as the installed build does.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from quantgate.formats.numbers import to_e4m3
from quantgate.subject.processor import has_amx

if TYPE_CHECKING:
    import torch

# Maps x, the scale and the zero point, all float32, to codes that are not clamped yet.
Int8Rule = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
Rule = TypeVar("Rule")
Narrowing = Literal["rounds", "truncates"]
"""How a build's own operators convert float32 to bfloat16."""

# Environment variables that change how a CPU computes; they are part of a measurement's identity.
_SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
    "OPENBLAS_CORETYPE",
    "NPY_DISABLE_CPU_FEATURES",
    "GLIBC_TUNABLES",
)


def arithmetic(device: str | None = None) -> dict[str, str]:
    """Return everything that determines how a computation on `device` rounds.

    The default device is the one that vLLM serves on here. On a CPU: the instruction set, vLLM's
    native library, the number of threads, the rules for bfloat16 and int8, AMX, and the environment
    variables that select among them. Two machines that agree in all of these agree bit for bit,
    except where a result depends on the order of threads.
    """
    import torch

    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return {"isa": torch.cuda.get_device_name()}
    return {
        "isa": torch.backends.cpu.get_cpu_capability(),
        "library": _native_library(),
        "threads": str(torch.get_num_threads()),
        "bfloat16": narrowing(),
        "int8": int8_rule_name(),
        # With AMX, vLLM's attention in bfloat16 is another kernel.
        **({"tiles": "AMX"} if has_amx() else {}),
        **{name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def _native_library() -> str:
    """Return the native library that vLLM loads on this processor (vllm/platforms/cpu.py)."""
    import torch

    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


@functools.cache
def narrowing() -> Narrowing:
    """Find out how the build's own operators convert float32 to bfloat16."""
    import torch

    operators = _operators()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(0.5, 2.0, 1024, device=device).bfloat16().view(4, 256)
    # SiLU(x) * 1.5; the second half of each row holds the factor.
    joined = torch.cat([x, torch.full_like(x, 1.5)], dim=1)
    given = torch.empty_like(x)
    operators.silu_and_mul(given, joined)
    exact = (torch.nn.functional.silu(x.double()) * 1.5).float()
    # CUDA's operator rounds SiLU(x) before multiplying, so not every product is the nearest.
    nearest, cut = (
        int((given == narrowed).sum())
        for narrowed in (exact.bfloat16(), truncate_to_bfloat16(exact))
    )
    return "truncates" if cut > nearest else "rounds"


def truncate_to_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Return float32 x truncated to bfloat16."""
    import torch

    bits = x.contiguous().view(torch.int32) & ~0xFFFF
    return bits.view(torch.float32).bfloat16()


def _fused(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Round the exact product plus the zero point to float32 once, then to an integer."""
    return (x.double() * scale.reciprocal().double() + zero_point.double()).float().round()


def _separate(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Round the product to float32, then the sum to float32, then to an integer."""
    return (x * scale.reciprocal() + zero_point).round()


def _rounded_first(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Round the product to an integer, then add the zero point."""
    return (x * scale.reciprocal()).round() + zero_point


INT8_RULES: Mapping[str, Int8Rule] = {
    "fused multiply-add": _fused,  # AVX-512 builds
    "product and sum rounded": _separate,  # the AVX2 build
    "product rounded first": _rounded_first,  # CUDA: an H200 with vLLM 0.26.0 agrees in every code
}
UNKNOWN = "unknown"


@functools.cache
def int8_rule_name() -> str:
    """Find out which of `INT8_RULES` the build uses for asymmetric inputs; "unknown" if none."""
    import torch

    _operators()
    from vllm._custom_ops import scaled_int8_quant

    x = _inputs_near_ties()
    codes, scale, zero_point = scaled_int8_quant(x, None, None, symmetric=False)
    for name, rule in INT8_RULES.items():
        own = rule(x.float(), scale, zero_point.float()).clamp(-128, 127)
        if torch.equal(own, codes.float()):
            return name
    return UNKNOWN


def _inputs_near_ties() -> torch.Tensor:
    """Return inputs that tell the rules apart, on the device that vLLM serves on.

    Products of 8-bit significands are often near ties: the asymmetric rules differ in 1 of 11,000.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 256, generator=generator).bfloat16()
    return x.cuda() if torch.cuda.is_available() else x


def int8_rule() -> Int8Rule:
    """Return this build's rule for asymmetric int8 inputs; `ValueError` if it is not known."""
    return _known(
        int8_rule_name(), INT8_RULES, "scaled_int8_quant", "int8 inputs with a zero point"
    )


class SymmetricRule(NamedTuple):
    """How a build computes the codes of int8 inputs without a zero point, before clamping."""

    dynamic: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From x [rows, H] and each row's largest magnitude [rows, 1]."""
    static: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From x and the checkpoint's scale [1]."""


def _by_reciprocal(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * scale.reciprocal()).round()


SYMMETRIC_RULES: Mapping[str, SymmetricRule] = {
    # The CPU builds.
    "product with the scale's reciprocal": SymmetricRule(
        lambda x, largest: _by_reciprocal(x, largest / 127), _by_reciprocal
    ),
    # CUDA (csrc, `dynamic_scaled_int8_quant_kernel` and `static_scaled_int8_quant_kernel`): when
    # measured, 398 codes of 1,048,576 differed from those of the other rule.
    "product with 127 over the largest, static quotient": SymmetricRule(
        # Not `127 / largest`, which torch computes as a product with the reciprocal.
        lambda x, largest: (x * (largest.new_tensor(127) / largest)).round(),
        lambda x, scale: (x / scale).round(),
    ),
}


@functools.cache
def symmetric_rule_name() -> str:
    """Find out which of `SYMMETRIC_RULES` the build uses; "unknown" if none."""
    import torch

    _operators()
    from vllm._custom_ops import scaled_int8_quant

    x = _inputs_near_ties()
    # With this scale many inputs lie midway between two codes, and 1.5 times the scale, multiplied
    # by its rounded reciprocal, is less than 1.5.
    scale = torch.tensor([7 / 256], device=x.device)
    dynamic, _, _ = scaled_int8_quant(x, None, None, symmetric=True)
    static, _, _ = scaled_int8_quant(x, scale, None, symmetric=True)
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    for name, rule in SYMMETRIC_RULES.items():
        own = (rule.dynamic(wide, largest), rule.static(wide, scale))
        found = (dynamic.float(), static.float())
        if all(torch.equal(a.clamp(-128, 127), b) for a, b in zip(own, found, strict=True)):
            return name
    return UNKNOWN


def symmetric_rule() -> SymmetricRule:
    """Return this build's rule for symmetric int8 inputs; `ValueError` if it is not known."""
    return _known(
        symmetric_rule_name(),
        SYMMETRIC_RULES,
        "scaled_int8_quant",
        "int8 inputs without a zero point",
    )


# Scales x [rows, H] by each row's scale [rows, 1], before rounding to E4M3.
Fp8Rule = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
BY_RECIPROCAL = "product with the scale's reciprocal"
FP8_RULES: Mapping[str, Fp8Rule] = {
    BY_RECIPROCAL: lambda x, scale: x * scale.reciprocal(),  # `QuantFP8.forward_native`
    "quotient": lambda x, scale: x / scale,  # CUDA: `dynamic_per_token_scaled_fp8_quant`
}


@functools.cache
def fp8_rule_name() -> str:
    """Find out which of `FP8_RULES` the build uses for an input per token; "unknown" if none.

    CPU builds have no kernel for it: vLLM computes it in torch.
    """
    import torch

    if not torch.cuda.is_available():
        return BY_RECIPROCAL
    _operators()
    from vllm._custom_ops import scaled_fp8_quant

    x = _inputs_near_ties()
    codes, scale = scaled_fp8_quant(x, use_per_token_if_dynamic=True)
    for name, rule in FP8_RULES.items():
        if torch.equal(to_e4m3(rule(x.float(), scale)).float(), codes.float()):
            return name
    return UNKNOWN


def fp8_rule() -> Fp8Rule:
    """Return this build's rule for FP8 inputs per token; `ValueError` if it is not known."""
    return _known(fp8_rule_name(), FP8_RULES, "scaled_fp8_quant", "FP8 inputs per token")


def _known(name: str, rules: Mapping[str, Rule], operator: str, of: str) -> Rule:
    if name == UNKNOWN:
        raise ValueError(
            f"this vLLM build's {operator} follows none of the rules known for {of} "
            f"({', '.join(rules)}), so there is no reference to judge it by; use another vLLM "
            "build, or add its rule to quantgate/formats/builds.py."
        )
    return rules[name]


@functools.cache
def _operators() -> Any:
    """Return vLLM's native operators, loaded as an engine would."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.ops._C

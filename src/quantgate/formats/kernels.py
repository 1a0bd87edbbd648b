"""How vLLM's linear kernels treat each format: which inputs they quantize, and how scales round.

A format's name does not determine this: Marlin keeps NVFP4 inputs in 16 bits, Cutlass quantizes
them. The engine reports the kernel of each linear, and the reference looks up that kernel's rule in
`RULES`. A kernel without a rule is not judged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from quantgate.errors import BadInput
from quantgate.subject.scheme import is_mx

# The kind of quantization in a config group; "packed" is low-bit integer weights with any inputs.
Family = Literal["int8", "fp8", "nvfp4", "mx", "packed"]
# "format": quantized if the format says so. "kept": always in the serving dtype. "int8": always
# quantized to int8, with a scale per token. "unknown": by a rule that the reference does not have.
Inputs = Literal["format", "kept", "int8", "unknown"]
# A kernel of two rules is named with the one that it follows (`measuring/capture.py`).
INT8_INPUTS = " (int8 inputs)"


class KernelRule(NamedTuple):
    """What a kernel does, and where in vLLM's sources."""

    family: Family
    inputs: Inputs
    source: str
    """A file in vllm/model_executor/kernels/linear, or a module of this package."""
    fp8_products: bool = False
    """Whether group scales are E4M3 with a float32 scale per channel, and the product of a code
    and its group's scale is rounded to E4M3."""
    truncates_zero_points: bool = False
    """Whether a static input's zero point is computed anew from its range and truncated."""
    sums_in_fp8_cores: bool = False
    """Whether whole sums stay in the accumulators of FP8 tensor cores; others move each group's
    sum out of them."""


@dataclass(frozen=True)
class LinearRules:
    """How one engine's kernels treat its linears, as far as the formats leave it open."""

    kept: frozenset[Family] = frozenset()
    """The families whose inputs are never quantized, whatever the format says."""
    int8: frozenset[Family] = frozenset()
    """The families whose inputs are quantized to int8 per token, whatever the format says."""
    fp8_products: bool = False
    """As `KernelRule.fp8_products`, for packed weights with FP8 inputs."""
    truncates_zero_points: bool = False
    """As `KernelRule.truncates_zero_points`, for static int8 inputs."""

    def as_key(self) -> dict[str, Any]:
        """Return all of it as JSON types: a reference on the disk belongs to its rules."""
        fields = vars(self).items()
        return {name: sorted(v) if isinstance(v, frozenset) else v for name, v in fields}


# vLLM's methods for experts whose inputs are quantized; each may choose among many kernels.
EXPERTS_WITH_INPUTS = re.compile(r"CompressedTensorsW\dA8.*MoEMethod")
# Platforms whose FP8 tensor cores add with few bits.
FEW_BITS = frozenset({"sm89", "sm90"})
# The rules of kernels that follow the format.
FORMATS_RULES = LinearRules()


def family_of(group: Any) -> Family:
    """Return the family of a config group."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    if is_mx(inputs) or is_mx(weights):
        return "mx"
    if weights.get("type") == "int" and inputs.get("type") != "int":
        return "packed"
    if int(weights["num_bits"]) == 4 and weights.get("type") == "float":
        return "nvfp4"
    return "int8" if weights.get("type") == "int" else "fp8"


def rules_of(kernels: Iterable[str]) -> LinearRules:
    """Return the rules of an engine's kernels; a string may name several, joined by " + ".

    Raises `BadInput` for a linear kernel that has no rule here or whose rule is unknown, and for
    vLLM's own experts with quantized inputs. Other names (attention, unquantized linears) are
    ignored.
    """
    if experts := [name for name in _names(kernels) if EXPERTS_WITH_INPUTS.fullmatch(name)]:
        raise BadInput(
            f"{experts[0]}: the reference has no rule for how vLLM's own kernels for experts "
            "quantize inputs, so it cannot judge them; gate the checkpoint on a CPU, where experts "
            "are emulated."
        )
    used = [name for name in _names(kernels) if name.removesuffix(INT8_INPUTS).endswith("Kernel")]
    for name in used:
        if name not in RULES:
            raise BadInput(
                f"{name}: the reference has no rule for how this vLLM kernel treats inputs and "
                f"scales, so it cannot judge it; set VLLM_DISABLED_KERNELS={name} to use another "
                "kernel, or add its rule to quantgate/formats/kernels.py."
            )
        if (rule := RULES[name]).inputs == "unknown":
            raise BadInput(
                f"{name}: this vLLM kernel quantizes inputs by a rule of its own "
                f"({rule.source}), which the reference does not have, so it cannot judge it; set "
                f"VLLM_DISABLED_KERNELS={name} to use another kernel."
            )
    ways = _inputs_of(used)
    return LinearRules(
        frozenset(family for family, way in ways if way == "kept"),
        frozenset(family for family, way in ways if way == "int8"),
        any(RULES[name].fp8_products for name in used),
        any(RULES[name].truncates_zero_points for name in used),
    )


def _inputs_of(used: Collection[str]) -> set[tuple[Family, Inputs]]:
    """Return what the kernels do to each family's inputs; `BadInput` if two differ."""
    ways: dict[Family, dict[Inputs, str]] = {}
    for name in used:
        ways.setdefault(RULES[name].family, {})[RULES[name].inputs] = name
    for family, by_way in ways.items():
        if len(by_way) > 1 and family != "mx":  # the reference keeps MX inputs anyway
            raise BadInput(
                f"{' and '.join(by_way.values())} both serve linears of the {family} formats, but "
                "only one of them quantizes inputs, and the reference has one rule for all; "
                "disable one of them with VLLM_DISABLED_KERNELS."
            )
    return {(family, way) for family, by_way in ways.items() for way in by_way}


def truncates_sums(kernels: str, platform: str) -> bool:
    """Return whether a module's kernels, joined by " + ", keep 13 bits behind the point of a sum.

    FP8 tensor cores of compute capability 8.9 and 9.0 do (DeepSeek-AI, "DeepSeek-V3 Technical
    Report", arXiv 2412.19437, section 3.3.2), which Blackwell's do not.
    """
    rules = (RULES.get(name) for name in kernels.split(" + "))
    return platform in FEW_BITS and any(rule and rule.sums_in_fp8_cores for rule in rules)


def _names(kernels: Iterable[str]) -> list[str]:
    return sorted({name for joined in kernels for name in joined.split(" + ")})


def explained(kernels: Iterable[str]) -> list[str]:
    """Return one sentence for each way in which the kernels deviate from their formats."""
    said = []
    for name in _names(kernels):
        if (rule := RULES.get(name)) is None:
            continue
        if rule.inputs == "kept":
            said.append(f"{name} keeps inputs in 16 bits, and so does the reference")
        if rule.inputs == "int8":
            kernel, static = name.removesuffix(INT8_INPUTS), rule.family == "int8"
            does = "gives static inputs a scale per token" if static else "quantizes inputs to int8"
            said.append(f"{kernel} {does}, and so does the reference")
        if rule.fp8_products:
            said.append(f"{name} rounds scales and weights to FP8, and so does the reference")
        if rule.truncates_zero_points:
            said.append(f"{name} truncates static zero points, and so does the reference")
    return said


def _rules(family: Family, inputs: Inputs, **sources: str) -> dict[str, KernelRule]:
    """Return rules for kernels of one kind, from their names and sources."""
    return {name: KernelRule(family, inputs, source) for name, source in sources.items()}


# Every kernel that vLLM 0.26.0 to 0.33.0 may choose on a CPU or on sm_80 to sm_120, and our own.
RULES: dict[str, KernelRule] = {
    # Integers of 4 or 8 bits; inputs are in 16 bits, or in FP8 where a format is W4AFP8.
    **_rules(
        "packed",
        "format",
        MacheteLinearKernel="mixed_precision/machete.py",
        MarlinLinearKernel="mixed_precision/marlin.py",
        AllSparkLinearKernel="mixed_precision/allspark.py",
        ConchLinearKernel="mixed_precision/conch.py",
        ExllamaLinearKernel="mixed_precision/exllama.py",
        TritonW4A16LinearKernel="mixed_precision/triton_w4a16.py",
        CPUWNA16LinearKernel="mixed_precision/cpu.py",
        DequantizingLinearKernel="quantgate/patches/emulated_kernels.py",
    ),
    # `convert_bf16_scales_to_fp8` and `cutlass_pack_scale_fp8`, which packs a scale's products with
    # all codes: on a checkpoint served by an H200 the two together give the errors that were
    # measured there (median 2.09e-2 of 2.09e-2, largest 2.65e-2 of 2.67e-2), scales alone 1.40e-2.
    "CutlassW4A8LinearKernel": KernelRule(
        "packed", "format", "mixed_precision/cutlass.py", fp8_products=True
    ),
    # `layer.use_w4a8`: with AMX, bfloat16 and VLLM_CPU_INT4_W4A8, which is on unless it is unset,
    # `int4_scaled_mm_cpu` quantizes inputs that the format keeps.
    "CPUWNA16LinearKernel" + INT8_INPUTS: KernelRule("packed", "int8", "mixed_precision/cpu.py"),
    # On an ARM processor with int4 inputs quantized inside of the product.
    **_rules(
        "packed",
        "unknown",
        Dynamic4bitLinearKernel="mixed_precision/dynamic_4bit.py",
        ZentorchWNA16LinearKernel="mixed_precision/zentorch.py",
        HummingLinearKernel="mixed_precision/humming.py",
    ),
    # int8: `scaled_int8_quant` of inputs.
    **_rules(
        "int8",
        "format",
        TritonInt8ScaledMMLinearKernel="scaled_mm/triton.py",
        CPUInt8ScaledMMLinearKernel="scaled_mm/cpu.py",
        DequantizingInt8LinearKernel="quantgate/patches/emulated_kernels.py",
    ),
    # `_apply_weights_sgl`: with AMX and symmetric inputs, it does not read a static input's scale.
    "CPUInt8ScaledMMLinearKernel" + INT8_INPUTS: KernelRule("int8", "int8", "scaled_mm/cpu.py"),
    # Its `process_weights_after_loading` computes a static input's scale and zero point from their
    # range and converts the zero point to an integer without rounding: a positive one becomes one
    # less than the file's. `audit-loaded` reports it; vLLM's CPU kernel rounds here.
    "CutlassInt8ScaledMMLinearKernel": KernelRule(
        "int8", "format", "scaled_mm/cutlass.py", truncates_zero_points=True
    ),
    **_rules(
        "int8",
        "unknown",
        ZentorchInt8ScaledMMLinearKernel="scaled_mm/zentorch.py",
        HummingInt8ScaledMMLinearKernel="scaled_mm/humming.py",
    ),
    # FP8: `QuantFP8` of inputs.
    **_rules(
        "fp8",
        "format",
        FlashInferFP8ScaledMMLinearKernel="scaled_mm/flashinfer.py",
        BlockWiseTorchFP8ScaledMMLinearKernel="scaled_mm/pytorch.py",
        TritonFP8ScaledMMLinearKernel="scaled_mm/triton.py",
        B12xTensorFP8ScaledMMLinearKernel="scaled_mm/b12x.py",
        CutlassFp8BlockScaledMMKernel="scaled_mm/cutlass.py",
        DeepGemmFp8BlockScaledMMKernel="scaled_mm/deep_gemm.py",
        FlashInferFp8DeepGEMMDynamicBlockScaledKernel="scaled_mm/flashinfer.py",
        TritonFp8BlockScaledMMKernel="scaled_mm/triton.py",
        B12xFp8BlockScaledMMKernel="scaled_mm/b12x.py",
        DequantizingFp8LinearKernel="quantgate/patches/emulated_kernels.py",
        DequantizingFp8BlockLinearKernel="quantgate/patches/emulated_kernels.py",
        CPUFP8W8A8ScaledMMLinearKernel="scaled_mm/cpu.py",
    ),
    **{
        name: rule._replace(sums_in_fp8_cores=True)
        for name, rule in _rules(
            "fp8",
            "format",
            CutlassFP8ScaledMMLinearKernel="scaled_mm/cutlass.py",
            PerTensorTorchFP8ScaledMMLinearKernel="scaled_mm/pytorch.py",
            ChannelWiseTorchFP8ScaledMMLinearKernel="scaled_mm/pytorch.py",
            RowWiseTorchFP8ScaledMMLinearKernel="scaled_mm/pytorch.py",
        ).items()
    },
    # `layer.input_scale = None`, and Marlin's product of 16-bit inputs.
    **_rules(
        "fp8",
        "kept",
        MarlinFP8ScaledMMLinearKernel="scaled_mm/marlin.py",
        CPUFp8BlockScaledMMKernel="scaled_mm/cpu.py",
        CPUFp8PerTensorScaledMMLinearKernel="scaled_mm/cpu.py",
        CPUFp8ChannelWiseScaledMMLinearKernel="scaled_mm/cpu.py",
    ),
    **_rules(
        "fp8",
        "unknown",
        CPUFp8W8A8BlockScaledMMKernel="scaled_mm/cpu.py",  # a scale a row, not a group
        HummingFP8ScaledMMLinearKernel="scaled_mm/humming.py",
    ),
    # NVFP4: `scaled_fp4_quant` of inputs.
    **_rules(
        "nvfp4",
        "format",
        CutlassNvFp4LinearKernel="nvfp4/cutlass.py",
        FlashInferCutlassNvFp4LinearKernel="nvfp4/flashinfer.py",
        FlashInferTrtllmNvFp4LinearKernel="nvfp4/flashinfer.py",
        FlashInferCudnnNvFp4LinearKernel="nvfp4/flashinfer.py",
        FlashInferB12xNvFp4LinearKernel="nvfp4/flashinfer.py",
        FlashInferCuteDslNvFp4LinearKernel="nvfp4/flashinfer.py",
        B12xNvFp4LinearKernel="nvfp4/b12x.py",
        FbgemmNvFp4LinearKernel="nvfp4/fbgemm.py",
        TorchNvFp4LinearKernel="nvfp4/pytorch.py",
        EmulationNvFp4LinearKernel="nvfp4/emulation.py",
        DequantizingNvFp4InputsLinearKernel="quantgate/patches/emulated_kernels.py",
        DequantizingNvFp4LinearKernel="quantgate/patches/emulated_kernels.py",  # of NVFP4A16
    ),
    **_rules(
        "nvfp4",
        "kept",
        MarlinNvFp4LinearKernel="nvfp4/marlin.py",
        B12xNvFp4W4A16LinearKernel="nvfp4/b12x.py",
        FlashInferCuteDslNvFp4W4A16LinearKernel="nvfp4/flashinfer.py",
    ),
    **_rules("nvfp4", "unknown", HummingNvFp4LinearKernel="nvfp4/humming.py"),
    # MXFP8 and MXFP4.
    **_rules(
        "mx",
        "kept",
        MarlinMxfp8LinearKernel="mxfp8/marlin.py",
        EmulationMxfp8LinearKernel="mxfp8/emulation.py",
        DequantizingMxfp8LinearKernel="quantgate/patches/emulated_kernels.py",
        MarlinMxFp4LinearKernel="mxfp4/marlin.py",
    ),
    **_rules("mx", "format", DequantizingMxFp4LinearKernel="quantgate/patches/emulated_kernels.py"),
    **_rules(
        "mx",
        "unknown",
        FlashInferCutlassMxfp8LinearKernel="mxfp8/flashinfer.py",
        FlashInferCutedslMxfp8LinearKernel="mxfp8/flashinfer.py",
        FlashInferTrtllmMxfp8LinearKernel="mxfp8/flashinfer.py",
        B12xMxfp8LinearKernel="mxfp8/b12x.py",
        TorchMxFp8LinearKernel="mxfp8/pytorch.py",
        HummingMxfp8LinearKernel="mxfp8/humming.py",
        FlashInferMxFp4LinearKernel="mxfp4/flashinfer.py",
        B12xMxFp4LinearKernel="mxfp4/b12x.py",
        EmulationMxfp4LinearKernel="mxfp4/emulation.py",
        HummingMxFp4LinearKernel="mxfp4/humming.py",
        EmulationMxfp6LinearKernel="mxfp6/emulation.py",
        HummingMxFp6LinearKernel="mxfp6/humming.py",
    ),
}

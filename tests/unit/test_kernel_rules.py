"""The rules of the kernels that serve, by their names."""

import pytest

from quantgate.errors import BadInput
from quantgate.formats.kernels import (
    FORMATS_RULES,
    INT8_INPUTS,
    LinearRules,
    explained,
    rules_of,
)


def test_rules_are_those_of_the_kernels_in_use() -> None:
    served = ["UnquantizedLinearMethod", "FlashAttentionImpl", "MacheteLinearKernel"]
    assert rules_of(served) == FORMATS_RULES
    assert rules_of([*served, "MarlinNvFp4LinearKernel"]).kept == {"nvfp4"}
    assert rules_of(["CutlassNvFp4LinearKernel"]) == FORMATS_RULES
    assert rules_of(["MarlinFP8ScaledMMLinearKernel + MacheteLinearKernel"]).kept == {"fp8"}
    assert rules_of(["CutlassW4A8LinearKernel"]) == LinearRules(fp8_products=True)
    assert explained(served) == []
    (said,) = explained(["CutlassInt8ScaledMMLinearKernel"])
    assert said.endswith("truncates static zero points, and so does the reference")
    (said,) = explained(["MarlinNvFp4LinearKernel + MacheteLinearKernel"])
    assert said == "MarlinNvFp4LinearKernel keeps inputs in 16 bits, and so does the reference"


def test_a_kernel_that_quantizes_inputs_against_the_format_is_named_so() -> None:
    int8 = "CPUWNA16LinearKernel" + INT8_INPUTS
    rules = rules_of([int8, "UnquantizedLinearMethod"])
    assert rules == LinearRules(int8=frozenset({"packed"}))
    assert rules.as_key() != FORMATS_RULES.as_key()
    assert explained([int8, "CPUInt8ScaledMMLinearKernel" + INT8_INPUTS]) == [
        "CPUInt8ScaledMMLinearKernel gives static inputs a scale per token, and so does the "
        "reference",
        "CPUWNA16LinearKernel quantizes inputs to int8, and so does the reference",
    ]
    with pytest.raises(BadInput, match="both serve linears of the packed formats"):
        rules_of([int8, "DequantizingLinearKernel"])


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (["TurboLinearKernel"], "TurboLinearKernel: the reference has no rule for how this"),
        (
            ["FlashInferCutlassMxfp8LinearKernel"],
            r"FlashInferCutlassMxfp8LinearKernel: .* rule of its own \(mxfp8/flashinfer.py\)",
        ),
        (
            ["MarlinNvFp4LinearKernel", "CutlassNvFp4LinearKernel"],
            "CutlassNvFp4LinearKernel and MarlinNvFp4LinearKernel both serve linears of the nvfp4",
        ),
    ],
)
def test_what_has_no_rule_is_refused_by_name(kernels: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        rules_of(kernels)

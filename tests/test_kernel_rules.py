"""The reference follows the kernel that serves a linear, not the name of its format.

GPUs' kernels are made up here: the CPU's emulated ones compute what those do, under their names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantgate import compare, engine
from quantgate.checkpoint import BadInput, EngineSettings
from quantgate.formats.kernels import FORMATS_RULES, RULES, LinearRules, explained, rules_of
from quantgate.measurement import Measurement
from quantgate.probe import Probe
from quantgate.replay import replay
from quantgate.verdict import Verdict

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def emulated_kernels() -> ModuleType:
    """The module of the emulated kernels, which vLLM's own must be imported before."""
    import_module("vllm.model_executor.kernels.linear")
    return import_module("quantgate.emulated_kernels")


@contextmanager
def called(kernel: type, name: str) -> Iterator[None]:
    """Let a kernel go by another's name."""
    own = kernel.__name__
    kernel.__name__ = name
    try:
        yield
    finally:
        kernel.__name__ = own


def test_every_kernel_that_the_installed_vllm_may_choose_has_a_rule() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    choices = {name: held for name, held in vars(linear).items() if name.startswith("_POSSIBLE_")}
    assert len(choices) >= 6
    for held in choices.values():
        for platform in (PlatformEnum.CUDA, PlatformEnum.CPU):
            assert {kernel.__name__ for kernel in held.get(platform, ())} <= RULES.keys()


def test_rules_are_those_of_the_kernels_in_use() -> None:
    served = ["UnquantizedLinearMethod", "FlashAttentionImpl", "MacheteLinearKernel"]
    assert rules_of(served) == FORMATS_RULES
    assert rules_of([*served, "MarlinNvFp4LinearKernel"]).kept == {"nvfp4"}
    assert rules_of(["CutlassNvFp4LinearKernel"]) == FORMATS_RULES
    assert rules_of(["MarlinFP8ScaledMMLinearKernel + MacheteLinearKernel"]).kept == {"fp8"}
    assert rules_of(["CutlassW4A8LinearKernel"]) == LinearRules(fp8_products=True)
    assert explained(served) == []
    (said,) = explained(["MarlinNvFp4LinearKernel + MacheteLinearKernel"])
    assert said == "MarlinNvFp4LinearKernel keeps inputs in 16 bits, and so does the reference"


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        (["TurboLinearKernel"], "TurboLinearKernel: the reference has no rule for what this"),
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


def judged(directory: Path, probe: Probe, into: Path) -> tuple[Measurement, dict[str, Verdict]]:
    """Serve a checkpoint in bfloat16 and replay it by its kernels' rules and by its format's."""
    measured, capture = engine.measure(
        directory, probe, settings=SETTINGS, dtype="bfloat16", announce=quiet, capture_into=into
    )
    assert capture is not None
    rules = {
        "its kernels'": rules_of(measured.provenance.kernels.values()),
        "its format's": FORMATS_RULES,
    }
    return measured, {
        name: compare.replayed(
            measured, replay(directory, probe, capture, announce=quiet, rules=rule), probe
        )
        for name, rule in rules.items()
    }


def test_nvfp4_under_marlin_is_replayed_without_quantized_inputs(
    root: Path,
    small_probe: Probe,
    tmp_path: Path,
    emulated_kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper: an H200's replay was up to 8.1e-2 off by the format's rule."""
    kernel = emulated_kernels.DequantizingNvFp4InputsLinearKernel

    def weight_only(self: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        weight = layer.weight.to(torch.bfloat16).float()
        found = torch.nn.functional.linear(x.float(), weight)
        return (found if bias is None else found + bias.float()).to(x.dtype)

    monkeypatch.setattr(kernel, "apply_weights", weight_only)
    with called(kernel, "MarlinNvFp4LinearKernel"):
        measured, verdicts = judged(root / "build" / "tiny-llama-nvfp4", small_probe, tmp_path)
    assert "MarlinNvFp4LinearKernel" in measured.provenance.kernels["mlp.down_proj"]
    assert verdicts["its kernels'"].outcome == "pass"
    assert verdicts["its format's"].outcome == "fail"
    assert max(d.measured for d in verdicts["its format's"].deviations) > 4e-2


def as_cutlass_w4a8(code: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Return weights as `convert_bf16_scales_to_fp8` and the table of products make them."""
    e4m3 = torch.float8_e4m3fn
    channel = scale.float().abs().amax(dim=1, keepdim=True) / 448
    eighth = ((scale.float() / channel).to(e4m3).float() / 8).to(e4m3).float()
    table = (eighth[:, :, None] * torch.arange(-8.0, 8.0)).to(e4m3).float()
    signed = (code - offset[:, :1]).long()
    groups = signed.reshape(len(code), scale.shape[1], -1) + 8
    return (table.gather(2, groups) * channel[:, :, None] * 8).reshape(code.shape)


def test_w4afp8_under_cutlass_is_replayed_with_its_products_in_fp8(
    root: Path,
    small_probe: Probe,
    tmp_path: Path,
    emulated_kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Hopper: an H200's replay was 2.09e-2 off at the median by the format's rule."""
    monkeypatch.setattr(emulated_kernels, "dequantize_groups", as_cutlass_w4a8)
    with called(emulated_kernels.DequantizingLinearKernel, "CutlassW4A8LinearKernel"):
        _, verdicts = judged(root / "build" / "tiny-llama-w4afp8", small_probe, tmp_path)
    assert verdicts["its kernels'"].outcome == "pass"
    assert verdicts["its format's"].outcome == "fail"
    assert 1.5e-2 < max(d.measured for d in verdicts["its format's"].deviations) < 4e-2

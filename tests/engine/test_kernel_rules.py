"""The reference follows the kernel that serves a linear, not the name of its format.

GPUs' kernels are made up here: the CPU's emulated ones compute what those do, under their names.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from quantgate.formats import builds
from quantgate.formats.kernels import FORMATS_RULES, INT8_INPUTS, RULES, LinearRules, rules_of
from quantgate.judging.budget import REPLAY_MODULE_16_BIT
from quantgate.judging.modules import replayed
from quantgate.judging.verdict import Verdict
from quantgate.measuring import session
from quantgate.measuring.engine import running_engine
from quantgate.measuring.loaded import audits_of
from quantgate.measuring.measurement import Measurement
from quantgate.measuring.replay import replay
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import Probe
from quantgate.subject.processor import has_amx

LIMIT = REPLAY_MODULE_16_BIT["bfloat16"]
SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


@pytest.fixture
def emulated_kernels() -> ModuleType:
    """The module of the emulated kernels, which vLLM's own must be imported before."""
    import_module("vllm.model_executor.kernels.linear")
    return import_module("quantgate.patches.emulated_kernels")


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


def judged(
    directory: Path, probe: Probe, into: Path, settings: EngineSettings = SETTINGS
) -> tuple[Measurement, dict[str, Verdict]]:
    """Serve a checkpoint in bfloat16 and replay it by its kernels' rules and by its format's."""
    measured, capture = session.measure(
        directory, probe, settings=settings, dtype="bfloat16", announce=quiet, capture_into=into
    )
    assert capture is not None
    rules = {
        "its kernels'": rules_of(measured.provenance.kernels.values()),
        "its format's": FORMATS_RULES,
    }
    return measured, {
        name: replayed(
            measured,
            replay(directory, probe, capture, announce=quiet, rules=rule),
            probe,
            rounding=lambda: np.zeros(1),
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


def int8_inputs(kernel: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an emulated kernel multiply as vLLM's does with AMX: int8 inputs, a scale a token."""
    load = kernel.process_weights_after_loading  # type: ignore[attr-defined]

    def loaded(self: Any, layer: Any) -> None:
        load(self, layer)
        layer.use_w4a8 = True

    def apply(self: Any, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True) / 127
        codes = (x.float() / scale).round().where(scale > 0, 0.0)
        found = torch.nn.functional.linear(codes, layer.weight.float()) * scale
        return (found if bias is None else found + bias.float()).to(x.dtype)

    monkeypatch.setattr(kernel, "process_weights_after_loading", loaded)
    monkeypatch.setattr(kernel, "apply_weights", apply)


def test_w4a16_under_amx_is_replayed_with_int8_inputs(
    root: Path,
    small_probe: Probe,
    tmp_path: Path,
    emulated_kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a Xeon with AMX: replay was up to 2.2e-2 off by the format's rule."""
    kernel = emulated_kernels.DequantizingLinearKernel
    int8_inputs(kernel, monkeypatch)
    with called(kernel, "CPUWNA16LinearKernel"):
        measured, verdicts = judged(root / "build" / "tiny-llama-w4a16", small_probe, tmp_path)
    assert measured.provenance.kernels["mlp.down_proj"] == "CPUWNA16LinearKernel" + INT8_INPUTS
    assert verdicts["its kernels'"].outcome == "pass"
    assert verdicts["its format's"].outcome == "fail"
    assert max(d.measured for d in verdicts["its format's"].deviations) > 1e-2


def test_w4a16_is_replayed_right_with_this_processors_kernel(
    root: Path, small_probe: Probe, tmp_path: Path
) -> None:
    """With AMX the real kernel quantizes inputs, elsewhere it does not."""
    native = replace(SETTINGS, kernels="native")
    measured, verdicts = judged(root / "build" / "tiny-llama-w4a16", small_probe, tmp_path, native)
    kernel = "CPUWNA16LinearKernel" + INT8_INPUTS * has_amx()
    assert measured.provenance.kernels["mlp.down_proj"] == kernel
    assert verdicts["its kernels'"].outcome == "pass"


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


class Cutlass:
    """`CutlassInt8ScaledMMLinearKernel`, of static inputs with a zero point.

    Scale and zero point as its `process_weights_after_loading` computes them from their range on
    CUDA, where torch divides by a number as a product with its reciprocal. Codes as csrc's
    `static_scaled_int8_azp_quant_kernel` makes them, and the epilogue `ScaledEpilogueBiasAzp`:
    float(accumulator - zero point x sum of weights), of integers.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        weight, scale, static, given, _ = self._get_layer_params(layer)  # type: ignore[attr-defined]
        highest, lowest = (static * (end - given.int()) for end in (127, -128))
        self.scale = (highest.max() - lowest.min()) * (torch.ones_like(static[0]) / 255)
        self.zero_point = (-128 - lowest.min() / self.scale).int()
        layer.input_zero_point = torch.nn.Parameter(self.zero_point, requires_grad=False)
        self.weight, self.weight_scale = weight.double(), scale.float().view(1, -1)
        self.adjustment = self.zero_point.double() * self.weight.sum(dim=1)

    def apply_weights(self, layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
        codes = (x.float() * (1 / self.scale)).round() + self.zero_point
        accumulator = codes.clamp(-128, 127).double() @ self.weight.T
        found = (accumulator - self.adjustment).float() * self.weight_scale * self.scale
        assert accumulator.abs().max() < 2**31
        result: torch.Tensor = (found if bias is None else found + bias.float()).to(x.dtype)
        return result


@pytest.fixture
def cutlass(emulated_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve static int8 inputs with zero points as Cutlass does, and under its name."""
    kernel = emulated_kernels.DequantizingInt8LinearKernel
    for name in ("process_weights_after_loading", "apply_weights"):
        monkeypatch.setattr(kernel, name, getattr(Cutlass, name))
    with called(kernel, "CutlassInt8ScaledMMLinearKernel"):
        yield


STATIC_ASYM = "tiny-llama-w8a8-static-asym"


@pytest.mark.usefixtures("cutlass")
def test_asymmetric_static_int8_under_cutlass_is_replayed_by_its_own_rule(
    root: Path, small_probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H200's replay was 5.71e-3 off in one module by the file's scales and zero points.

    Positive zero points are one less there, so the highest code of inputs stands for one step less.
    Half a scale goes to the even code before the zero point is added, and after it on a CPU. What
    is subtracted is subtracted from integers, so cancellation costs nothing.
    """
    directory = root / "build" / STATIC_ASYM
    measured, capture = session.measure(
        directory, small_probe, settings=SETTINGS, dtype="bfloat16", announce=quiet,
        capture_into=tmp_path,
    )  # fmt: skip
    assert capture is not None
    rules = rules_of(measured.provenance.kernels.values())
    assert rules.truncates_zero_points
    cuda = "product rounded first"

    def errors(rule: str, rules: LinearRules) -> dict[str, float]:
        monkeypatch.setattr(builds, "int8_rule_name", lambda: rule)
        replayed = replay(directory, small_probe, capture, announce=quiet, rules=rules)
        return {module.name: module.output for module in replayed.modules}

    assert max(errors(cuda, rules).values()) < LIMIT
    for wrong in builds.INT8_RULES.keys() - {cuda}:  # a CPU's
        assert 5e-3 < max(errors(wrong, rules).values()) < 2e-2
    by_file = errors(cuda, LinearRules())
    assert max(by_file, key=lambda name: by_file[name]) == "model.layers.1.mlp.down_proj"
    assert 5e-3 < max(by_file.values()) < 8e-3  # of a smaller probe than the H200 scored


@pytest.mark.usefixtures("cutlass")
def test_a_zero_point_that_a_kernel_changes_is_named(root: Path) -> None:
    with running_engine(
        root / "build" / STATIC_ASYM, settings=SETTINGS, dtype="bfloat16", audit_load=True
    ) as llm:
        (audit,) = audits_of(llm)
    assert audit is not None
    said = {problem.name: str(problem) for problem in audit.problems}
    assert said["model.layers.1.mlp.down_proj.input_zero_point"] == (
        "model.layers.1.mlp.down_proj.input_zero_point: 3 is in use; expected 4, the file's"
    )
    assert "model.layers.1.self_attn.o_proj.input_zero_point" not in said  # -6, and stays
    # Of linears that are fused in one, each is named.
    fused = [f"model.layers.0.self_attn.{name}_proj.input_zero_point" for name in "qkv"]
    assert [said[name].partition(": ")[2] for name in fused] == [
        "2 is in use; expected 3, the file's"
    ] * 3

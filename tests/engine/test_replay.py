"""Replay: what it sees of real engines that are wrong in one place, and whose fault it says."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantgate.formats import library_weights
from quantgate.formats.weights import dequantize_weight
from quantgate.judging import fidelity
from quantgate.judging.modules import replayed
from quantgate.judging.verdict import Verdict
from quantgate.measuring import parameters, session
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import Measurement
from quantgate.measuring.replay import Replay, replay
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.probe import Probe

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


def served_and_replayed(
    directory: Path, probe: Probe, into: Path, settings: EngineSettings = SETTINGS
) -> tuple[Measurement, Replay]:
    measured, capture = session.measure(
        directory, probe, settings=settings, dtype="float32", announce=quiet, capture_into=into
    )
    assert capture is not None
    return measured, replay(directory, probe, capture, announce=quiet)


# Faults of an engine, each in one place ----------------------------------------------------------


def test_a_fault_of_one_kernel_is_found_where_it_is(
    quantized: Path, small_probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A millionth of one module's weights is off: no log-probability shows it, replay does."""
    import vllm.model_executor.kernels.linear  # noqa: F401  first: it brings the emulated ones

    from quantgate.patches import emulated_kernels

    honest = emulated_kernels.dequantize_groups
    calls = iter(range(1000))

    def faulty(code: Any, scale: Any, offset: Any) -> torch.Tensor:
        weight: torch.Tensor = honest(code, scale, offset)
        if next(calls) == 7:  # four a layer, in order: the second layer's down_proj
            weight[17] *= 1.01
        return weight

    monkeypatch.setattr(emulated_kernels, "dequantize_groups", faulty)
    measured, found = served_and_replayed(quantized, small_probe, tmp_path)
    verdict = replayed(measured, found, small_probe, rounding=lambda: np.zeros(1))
    assert verdict.outcome == "fail"
    off = [module.name for module in found.modules if module.output > 1e-5]
    assert off == ["model.layers.1.mlp.down_proj"]
    assert verdict.evidence[0].startswith("module     model.layers.1.mlp.down_proj: output 0.0")
    assert verdict.evidence[0].endswith("DequantizingLinearKernel")
    assert verdict.kernels["mlp.down_proj"] == "DequantizingLinearKernel"


def fidelity_of(directory: Path, probe: Probe) -> Verdict:
    few = dataclasses.replace(probe, windows=probe.windows[:3])
    checkpoint = Checkpoint(id="x", source=str(directory), engine=SETTINGS)
    lab = Lab(lambda *_: few, Ledger(quiet))
    return fidelity.free_running(Case.of(checkpoint, "float32", lab))


def test_a_damaged_scale_is_the_checkpoints_fault(quantized_copy: Path, probe: Probe) -> None:
    path = quantized_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3, 1] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    verdict = fidelity_of(quantized_copy, probe)
    assert verdict.outcome == "fail"
    assert verdict.attribution.startswith("CHECKPOINT: ")


def test_a_wrong_dequantizer_is_the_references_fault(
    quantized: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours forgets a zero point of one; the engine sides with the library's."""

    def wrong(tensors: Any, weights: Any) -> torch.Tensor:
        return dequantize_weight(tensors, weights) + 1e-3

    monkeypatch.setattr(parameters, "dequantize_weight", wrong)
    monkeypatch.setattr(library_weights, "dequantize_weight", wrong)
    verdict = fidelity_of(quantized, probe)
    assert verdict.outcome == "fail"
    assert verdict.attribution.startswith("REFERENCE: the two dequantizers differ by")
    assert "e-07 from the one over compressed-tensors'" in verdict.attribution

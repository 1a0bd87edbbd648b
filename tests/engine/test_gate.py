"""Faults of an engine, seen by the comparisons that judge it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from damage import scale_one_group
from safetensors.torch import load_file, save_file
from smaller import golden_of_part

from quantgate.judging import compare
from quantgate.judging.golden import golden_path
from quantgate.judging.verdict import Verdict
from quantgate.measuring import reference, session
from quantgate.measuring.measurement import Measurement
from quantgate.patches.scoremode import logprob
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import Probe, passage, probe_for

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable")


def measure_engine(directory: Path, probe: Probe, dtype: str = "float32") -> Measurement:
    measured, _ = session.measure(
        directory, probe, settings=SETTINGS, dtype=dtype, announce=lambda _: None
    )
    return measured


def measure_reference(directory: Path, probe: Probe, dtype: str = "float32") -> Measurement:
    return reference.measure(directory, probe, dtype=dtype, announce=lambda _: None)


def fidelity_fp32(
    engine_side: Measurement, reference_side: Measurement, exact: Measurement, probe: Probe
) -> Verdict:
    return compare.fidelity_fp32(engine_side, reference_side, probe, exact=lambda: exact)


def test_a_fault_on_the_engines_side_alone_fails_fidelity(
    quantized: Path, quantized_copy: Path, small_probe: Probe
) -> None:
    probe = small_probe
    scale_one_group(quantized_copy, 1.02)
    perturbed = measure_engine(quantized_copy, probe)
    honest, same_fault = (measure_reference(path, probe) for path in (quantized, quantized_copy))
    exact = measure_reference(quantized, probe, "float64")
    verdict = fidelity_fp32(perturbed, honest, exact, probe)
    assert verdict.outcome == "fail"
    assert verdict.deviations[0].measured > 10 * verdict.deviations[0].allowed
    assert verdict.emulated == ("DequantizingLinearKernel",)
    assert any("mlp.down_proj DequantizingLinearKernel" in line for line in verdict.evidence)
    # The same weights on both sides: the checkpoint may be bad, but it is served as it is.
    verdict = fidelity_fp32(perturbed, same_fault, exact, probe)
    assert verdict.outcome == "pass"
    # The embedded model keeps to the plain limit, without recourse to its own rounding.
    assert verdict.deviations[0].measured <= verdict.deviations[0].allowed == 1e-5


def test_an_nan_fails_every_comparison(
    quantized: Path, quantized_copy: Path, small_probe: Probe
) -> None:
    probe = small_probe
    path = quantized_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    broken = measure_engine(quantized_copy, probe)
    honest = measure_reference(quantized, probe)
    for verdict in (
        fidelity_fp32(broken, honest, honest, probe),
        compare.fidelity_serving(broken, honest, honest, probe, base_noise=None),
        compare.quality(broken, honest, probe, margin=1.0),
        compare.drift_exact(broken, honest, probe, exact=lambda: honest, reference=lambda: honest),
        compare.drift_mean(broken, honest, probe, margin=1.0, moved=lambda: 0.0),
    ):
        assert verdict.outcome == "fail"
        assert verdict.deviations[0].what == "non-finite log-probs"
        assert verdict.deviations[0].measured == probe.scored


def test_engines_that_differ_by_a_ten_thousandth_of_a_nat_are_told_apart(
    quantized: Path,
    root: Path,
    probe: Probe,
    small_probe: Probe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every log-probability by the same 1e-4: too little for any average of a benchmark."""
    path = golden_path(root, "tiny-llama-w4a16", "drift-float32", "cpu")
    golden = golden_of_part(path, probe, small_probe).measurement

    def judge(measured: Measurement) -> Verdict:
        return compare.drift_exact(
            measured, golden, small_probe, exact=lambda: golden, reference=lambda: golden
        )

    assert judge(measure_engine(quantized, small_probe)).outcome == "pass"
    honest = logprob.score_rows

    def shifted(head: Any, hidden: Any, targets: Any) -> Any:
        found = honest(head, hidden, targets)
        return found._replace(logprob=found.logprob - 1e-4)

    monkeypatch.setattr(logprob, "score_rows", shifted)
    measured = measure_engine(quantized, small_probe)
    verdict = judge(measured)
    assert verdict.outcome == "fail"
    (largest,) = verdict.deviations
    assert (largest.what, largest.allowed) == ("max |Δ log-prob|", 1e-5)
    assert largest.measured == pytest.approx(1e-4, rel=0.1)
    # The mean alone would not have told: a tenth of its margin.
    mean = compare.drift_mean(measured, golden, small_probe, margin=1e-3, moved=lambda: 0.0)
    assert mean.outcome == "pass"


def test_a_token_is_shown_in_its_text(quantized: Path, probe: Probe) -> None:
    found, _ = probe_for(probe, quantized)
    window = found.windows[0]
    row = 40
    shown = passage(found, row)
    text = window.text.replace("\n", "\\n")
    assert shown.before + shown.token + shown.after in text
    assert str(shown) == f"…{shown.before}»{shown.token}«{shown.after}…"
    assert passage(probe, row).token == f"token {window.ids[window.score_from + row]}"

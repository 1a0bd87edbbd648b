"""The gate end to end, on real engines: what it passes, what it fails, and what it says."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import RunGate
from safetensors.torch import load_file, save_file
from smaller import golden_of_part

from quantgate.judging import checks, compare
from quantgate.judging.golden import golden_path
from quantgate.judging.next_step import next_step
from quantgate.judging.verdict import Deviation, Verdict
from quantgate.measuring import engine, reference
from quantgate.measuring.measurement import Measurement
from quantgate.patches.scoremode import logprob
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe, passage, probe_for

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable")
CHECKS = [
    "fidelity-float32",
    "fidelity-serving",
    "replay-float32",
    "replay-serving",
    "divergence-from-reference",
    "divergence-from-base",
    "quality",
    "drift-float32",
    "drift-serving",
    "invariance-float32",
    "invariance-serving",
]


def scale_one_group(directory: Path, factor: float) -> None:
    """Multiply one group's scale, in one row of one layer, as a silent fault would."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    scale = tensors["model.layers.1.mlp.down_proj.weight_scale"]
    scale[7, 2] = (scale[7, 2].float() * factor).to(scale.dtype)
    save_file(tensors, path, {"format": "pt"})


def measure_engine(directory: Path, probe: Probe, dtype: str = "float32") -> Measurement:
    measured, _ = engine.measure(
        directory, probe, settings=SETTINGS, dtype=dtype, announce=lambda _: None
    )
    return measured


def measure_reference(directory: Path, probe: Probe, dtype: str = "float32") -> Measurement:
    return reference.measure(directory, probe, dtype=dtype, announce=lambda _: None)


def fidelity_fp32(
    engine_side: Measurement, reference_side: Measurement, exact: Measurement, probe: Probe
) -> Verdict:
    return compare.fidelity_fp32(
        engine_side,
        reference_side,
        probe,
        rounding=lambda: compare.largest_difference(exact, reference_side),
    )


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


def test_a_changed_checkpoint_passes_fidelity_and_fails_drift(
    run_gate: RunGate, quantized_copy: Path
) -> None:
    scale_one_group(quantized_copy, 1.02)
    path = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    lines = [
        f'source = "{quantized_copy}"' if line.startswith("source") else line
        for line in path.read_text().splitlines()
        if not line.startswith("revision")
    ]
    path.write_text("\n".join(lines) + "\n")
    goldens = {p: p.read_bytes() for p in (run_gate.project / "golden").rglob("*.json")}
    # The engines with other settings would pass, each after half a minute: `make gate` has them.
    few = "not tensor and not compiled"
    result = run_gate("suites", "--gate-report", "report", "-k", few)
    assert result.returncode == 1, result.stdout
    (checkpoint,) = run_gate.report["checkpoints"]
    checks = {check["name"]: check for check in checkpoint["checks"]}
    assert list(checks) == CHECKS
    assert checks["fidelity-float32"]["verdict"] == "pass"
    assert checks["drift-float32"]["verdict"] == "fail"
    assert checks["drift-float32"]["measured"] > 1e-4
    # Beyond 1e-5 it is allowed what float32 costs the reference, which depends on the processor.
    assert 1e-5 <= checks["drift-float32"]["allowed"] < 3e-5
    assert "the bytes are not the approved ones" in checks["drift-float32"]["detail"]
    assert run_gate.report["verdict"] == checkpoint["verdict"] == "fail"
    for text in (
        "tiny-llama-w4a16 drift-float32: FAIL: engine and golden differ by",
        "max |Δ log-prob| is",
        "allowed <= 1",
        "worst      heldout-",
        'python tools/regen_golden.py --checkpoint tiny-llama-w4a16 --reason "…"',
    ):
        assert text in result.stdout
    assert "Traceback" not in result.stdout
    assert goldens == {p: p.read_bytes() for p in goldens}


@pytest.mark.slow(reason="engines that vLLM compiles, as for any checkpoint without a file")
def test_a_checkpoint_given_by_path_is_gated_without_a_golden(
    run_gate: RunGate, quantized: Path, root: Path
) -> None:
    result = run_gate(
        "suites",
        "--checkpoint", quantized,
        "--base", root / "fixtures" / "tiny" / "llama",
        "--gate-report", "report",
        "-k", "not float32",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    (checkpoint,) = run_gate.report["checkpoints"]
    assert [check["name"] for check in checkpoint["checks"]] == [
        "fidelity-serving",
        "replay-serving",
        "divergence-from-reference",
        "divergence-from-base",
        "quality",
        "invariance-serving",
    ]
    assert "it has no golden: given by path" in result.stdout


def test_a_missing_golden_is_not_run_and_does_not_pass(run_gate: RunGate) -> None:
    golden = run_gate.project / "golden" / "tiny-llama-w4a16" / "drift-float32.cpu.json"
    golden.unlink()
    result = run_gate("suites", "-k", "drift and float32", "--gate-report", "report")
    assert result.returncode == 1
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert check["verdict"] == "not-run"
    assert "drift-float32.cpu.json does not exist" in check["detail"]
    assert "tools/regen_golden.py --checkpoint tiny-llama-w4a16" in result.stdout
    assert not golden.exists()


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
        compare.drift_exact(broken, honest, probe, rounding=lambda: 0.0),
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
        return compare.drift_exact(measured, golden, small_probe, rounding=lambda: 0.0)

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


LOUD = """
import logging, sys
import pytest
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.judging.verdict import Verdict

def _library():
    logging.getLogger("torch.__trace").debug("a line of a library's log")
    print("printed by a library")
    print("a library's warning", file=sys.stderr)

def test_quality(gate, checkpoint, device):
    _library()
    gate.judge(Verdict("fail", "it costs too much"))

def test_drift(gate, checkpoint, device):
    _library()
    raise EngineFailure("the engine ended")

def test_replay(gate, checkpoint, device):
    _library()
    raise RuntimeError("nobody foresaw this")
"""


def test_a_failing_check_shows_its_reason_and_not_what_libraries_log(run_gate: RunGate) -> None:
    suites = run_gate.project / "suites"
    shutil.rmtree(suites)
    suites.mkdir()
    (suites / "test_loud.py").write_text(LOUD)
    found = run_gate("suites", "--log-level=DEBUG", "-k", "quality or drift").stdout
    assert "tiny-llama-w4a16 quality: FAIL: it costs too much" in found
    assert "the engine ended" in found
    assert "library" not in found
    found = run_gate("suites", "--log-level=DEBUG", "-k", "replay").stdout
    assert "RuntimeError: nobody foresaw this" in found
    assert "printed by a library" in found
    assert "a line of a library's log" not in found


def test_every_check_is_asked_by_one_test_of_the_suites(root: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "suites").glob("*.py"))]
    asked = re.findall(r"^def (test_\w+)", "\n".join(texts), re.MULTILINE)
    found = [checks.of_test(function) for function in asked]
    assert {*found} == {*checks.CHECKS}
    assert len(found) == len(checks.CHECKS)
    names = [name for check in checks.CHECKS for name in check.names]
    assert len(names) == len(set(names))
    places = [checks.place_of(name) for name in [*names, "seen"]]
    assert places == sorted(places)
    assert set(places) == {*range(len(checks.CHECKS) + 1)}


@pytest.mark.parametrize(
    ("before", "key"),
    [
        ("quick = true", 'not_quick = ["replay"]'),
        ("[engine]", '[[known_failure]]\ncheck = "fidelity"\nreason = "x"\nissue = "x"\n[engine]'),
    ],
)
def test_a_file_that_names_no_check_is_refused(run_gate: RunGate, before: str, key: str) -> None:
    """It would be a known failure of nothing, and stay when what it was about is gone."""
    file = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("not_quick")]
    file.write_text("\n".join(lines).replace(before, key, 1))
    done = run_gate("suites")
    assert done.returncode == 4
    assert "is not a check; there are fidelity-float32, fidelity-serving, replay-float32" in (
        done.stderr
    )


def test_every_check_that_can_fail_says_what_to_do_next(root: Path) -> None:
    """Drift says it itself, with the tool that approves."""
    known = read_checkpoint_files(root)["tiny-llama-w4a16"]
    by_path = dataclasses.replace(known, scheme=None, source="/my models/x", base="org/base")
    failed = Verdict("fail", "off", (Deviation("bound", 0.2, 0.1),))
    for check in checks.CHECKS:
        for name in check.names:
            assert bool(next_step(name, failed, known)) is (check.family != "drift"), name
    assert next_step("fidelity-float32", failed, known).endswith(
        "pytest suites --checkpoint tiny-llama-w4a16 -k replay"
    )
    assert "--checkpoint '/my models/x' --base org/base" in next_step(
        "replay-serving", failed, by_path
    )
    assert "sequential_quality" in next_step("quality", Verdict("inconclusive", ""), known)


@pytest.mark.parametrize(
    ("measured", "fault"), [(0.2, False), (1.0, False), (1.001, True), (float("nan"), True)]
)
@pytest.mark.parametrize("check", ["quality", "divergence-from-base"])
def test_a_loss_far_beyond_its_margin_is_no_reason_to_raise_it(
    root: Path, check: str, measured: float, fault: bool
) -> None:
    known = read_checkpoint_files(root)["tiny-llama-w4a16"]
    verdict = Verdict("fail", "off", (Deviation("bound", measured, 0.1),))
    step = next_step(check, verdict, known)
    assert ("do not raise the margin" in step) is fault
    assert ("give [budget.quality] a margin" in step) is not fault
    assert ('tiny-llama-w4a16 -k "fidelity or replay"' in step) is fault


def test_a_token_is_shown_in_its_text(quantized: Path, probe: Probe) -> None:
    found, _ = probe_for(probe, quantized)
    window = found.windows[0]
    row = 40
    shown = passage(found, row)
    text = window.text.replace("\n", "\\n")
    assert shown.before + shown.token + shown.after in text
    assert str(shown) == f"…{shown.before}»{shown.token}«{shown.after}…"
    assert passage(probe, row).token == f"token {window.ids[window.score_from + row]}"

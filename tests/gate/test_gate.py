"""The gate end to end, on real engines: what it passes, what it fails, and what it says."""

import shutil
from pathlib import Path

import pytest
from damage import scale_one_group
from harness import RunGate

pytestmark = pytest.mark.long

CHECKS = [
    "audit",
    "audit-weights",
    "audit-loaded",
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
        'quantgate approve --checkpoint tiny-llama-w4a16 --reason "…"',
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
        "audit",
        "audit-weights",
        "audit-loaded",
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
    assert "quantgate approve --checkpoint tiny-llama-w4a16" in result.stdout
    assert not golden.exists()


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
    assert "is not a check; there are audit, audit-weights, audit-loaded" in (done.stderr)

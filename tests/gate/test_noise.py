"""The noise floors of gate runs, stored or measured."""

import json
import re

import pytest
from harness import RunGate

pytestmark = pytest.mark.long


def test_the_gate_prints_the_stored_floor_and_cannot_decide_below_it(run_gate: RunGate) -> None:
    """A floor of 1 nat, above the margin; the same run with the true one passes."""
    path = run_gate.project / "golden" / "tiny-llama-w4a16" / "noise-serving.cpu.json"
    honest = path.read_text()
    content = json.loads(honest)
    for name in content["reruns"]:
        content["reruns"][name]["mean"] = 1.0
    path.write_text(json.dumps(content))
    result = run_gate("suites", "-k", "quality", "--gate-report", "report")
    assert result.returncode == 1
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert (check["verdict"], check["noise_floor"]) == ("inconclusive", 1.0)
    assert "noise alone moves it by 1, above its limit" in result.stdout
    assert "noise floor 1\n" in result.stdout
    assert "(unpaired " in result.stdout
    assert re.search(r"^  since then .* \(golden of 20", result.stdout, re.MULTILINE)

    path.write_text(honest)
    result = run_gate("suites", "-k", "quality", "--gate-report", "report")
    assert result.returncode == 0, result.stdout
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    moved = [m["mean"] for m in json.loads(honest)["reruns"].values()]
    assert check["noise_floor"] == max(moved) > 0


def test_without_a_stored_floor_one_is_measured(run_gate: RunGate) -> None:
    """As for a checkpoint given by path; an edited file cannot make one of another key count."""
    path = run_gate.project / "golden" / "tiny-llama-w4a16" / "noise-float32.cpu.json"
    content = json.loads(path.read_text())
    stored = max(moved["max_abs"] for moved in content["reruns"].values())
    content["key"]["identity"] = "f" * 64
    content["reruns"] = {"a": {"max_abs": 7.0}}
    path.write_text(json.dumps(content))
    result = run_gate("suites", "-k", "drift and float32", "--gate-report", "report")
    assert result.returncode == 0, result.stdout
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert check["noise_floor"] == pytest.approx(stored, rel=10)
    assert "vLLM, served otherwise" in result.stdout

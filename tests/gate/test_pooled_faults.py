"""Models that pool through the gate, as a user sees them."""

from pathlib import Path

from harness import RunGate

ROOT = Path(__file__).resolve().parents[2]


def test_a_generate_model_is_refused_a_token_task(project: Path, run_gate: RunGate) -> None:
    path = project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    path.write_text(path.read_text().replace("\n[engine]", 'task = "token_classify"\n\n[engine]'))
    result = run_gate("suites", "-q")
    assert result.returncode == 4
    assert "a LlamaForCausalLM does 'generate', not 'token_classify'" in result.stderr
    assert "it has no head for labels." in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_a_directory_of_ones_own_is_judged_by_what_it_does(run_gate: RunGate) -> None:
    """Its task is its architecture's; without a file it has no golden and no step tag."""
    result = run_gate(
        "suites", "--checkpoint", ROOT / "build" / "tiny-prm-native-w4a16",
        "--base", ROOT / "fixtures" / "tiny" / "prm-native", "--gate-report", "report",
        "-k", "activation or head or steps or drift",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    (checkpoint,) = run_gate.report["checkpoints"]
    assert checkpoint["task"] == "token_reward"
    assert {check["name"] for check in checkpoint["checks"]} == {"activation", "head"}
    assert "its file has no step_tag_id" in result.stdout
    assert "it has no golden" in result.stdout
    assert checkpoint["emulated"] == ["DequantizingLinearKernel"]

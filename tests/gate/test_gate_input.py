"""What bad input gets from the gate: one sentence, a non-zero exit, nothing written."""

from pathlib import Path

import pytest
from harness import RunGate

USAGE_ERROR = 4


def refusal(run_gate: RunGate, *arguments: str | Path) -> str:
    """Return the one sentence that a refused run prints."""
    report = Path("refused-report")
    result = run_gate("suites", "--gate-report", report, *arguments)
    assert result.returncode == USAGE_ERROR, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (run_gate.project / report).exists()
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
    return line


def test_a_path_that_does_not_exist(run_gate: RunGate) -> None:
    assert "./nowhere: no such directory" in refusal(run_gate, "--checkpoint", "./nowhere").replace(
        f"{run_gate.project}/", "./"
    )


def test_an_unknown_id_names_the_nearest(run_gate: RunGate) -> None:
    message = refusal(run_gate, "--checkpoint", "tiny-lama-w4a16")
    assert "nearest: tiny-llama-w4a16" in message


def test_workers_say_it_in_the_same_sentence(run_gate: RunGate) -> None:
    """An exception while a worker collects would be an internal error of xdist."""
    result = run_gate("suites", "-n", "2", "--checkpoint", "tiny-lama-w4a16")
    assert result.returncode == USAGE_ERROR, result.stdout + result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ERROR: ")]
    assert "nearest: tiny-llama-w4a16" in line
    assert "INTERNALERROR" not in result.stdout


def test_a_directory_without_quantization_config(run_gate: RunGate) -> None:
    message = refusal(run_gate, "--checkpoint", "fixtures/tiny/llama")
    assert "config.json: no quantization_config" in message
    assert "--base" in message


def test_truncated_weights(run_gate: RunGate, quantized_copy: Path) -> None:
    weights = quantized_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    message = refusal(run_gate, "--checkpoint", quantized_copy)
    assert f"{weights}: truncated or corrupt" in message


def test_pickled_weights(run_gate: RunGate, quantized_copy: Path) -> None:
    (quantized_copy / "model.safetensors").rename(quantized_copy / "pytorch_model.bin")
    message = refusal(run_gate, "--checkpoint", quantized_copy)
    assert "pytorch_model.bin: pickled weights" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('shceme = "W4A16"', "unknown key 'shceme'; did you mean 'scheme'?"),
        ('task = "genrate"', "Invalid enum value 'genrate'"),
    ],
)
def test_a_checkpoint_file_with_a_wrong_key(run_gate: RunGate, line: str, expected: str) -> None:
    path = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    path.write_text(f"{line}\n{path.read_text()}")
    message = refusal(run_gate)
    assert str(path) in message
    assert expected in message


def test_a_scheme_that_config_json_contradicts(run_gate: RunGate) -> None:
    path = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    path.write_text(path.read_text().replace("W4A16", "W8A8"))
    message = refusal(run_gate)
    assert "scheme is 'W8A8'" in message
    assert "says 'W4A16'" in message


def test_bytes_that_are_not_the_pinned_ones(run_gate: RunGate) -> None:
    path = run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml"
    text = path.read_text()
    start = text.index("sha256:") + len("sha256:")
    path.write_text(text[:start] + "0" * 64 + text[start + 64 :])
    assert f"pins sha256:{'0' * 64}" in refusal(run_gate)


def test_a_gpu_that_is_not_there(run_gate: RunGate) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    message = refusal(run_gate, "-m", "gpu")
    assert "it needs a GPU and this machine has none" in message


def test_a_selection_that_matches_nothing(run_gate: RunGate) -> None:
    assert "no check is selected: -k 'nothing'" in refusal(run_gate, "-k", "nothing")


def test_a_base_without_a_checkpoint(run_gate: RunGate) -> None:
    assert "--base goes with a checkpoint given by path" in refusal(run_gate, "--base", "./x")


def test_a_base_for_a_checkpoint_that_names_its_own(run_gate: RunGate) -> None:
    message = refusal(run_gate, "--checkpoint", "tiny-llama-w4a16", "--base", "./x")
    assert "tiny-llama-w4a16.toml says what tiny-llama-w4a16's base is" in message


def test_two_checkpoints_of_one_name(run_gate: RunGate, quantized_copy: Path) -> None:
    other = quantized_copy.parent / "elsewhere" / "Copy"
    other.parent.mkdir()
    other.symlink_to(quantized_copy)
    message = refusal(run_gate, "--checkpoint", quantized_copy, "--checkpoint", other)
    assert "two of the checkpoints would get the id 'copy'" in message


def test_no_checkpoint_at_all(run_gate: RunGate) -> None:
    (run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml").unlink()
    assert "no checkpoint file there" in refusal(run_gate)


@pytest.mark.parametrize("option", ["--snapshot-update", "--snapshot-update-new-only"])
def test_a_run_that_would_write_goldens(run_gate: RunGate, option: str) -> None:
    before = {path: path.read_bytes() for path in (run_gate.project / "golden").rglob("*.json")}
    message = refusal(run_gate, option)
    assert "quantgate approve" in message
    assert before == {path: path.read_bytes() for path in before}

"""Replay in gate runs: faults, known failures and their end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import RunGate
from safetensors.torch import load_file, save_file

from as_machine import environment_of
from quantgate.subject.processor import flags

pytestmark = pytest.mark.long


def change(project: Path, name: str, edit: Callable[[str], str]) -> None:
    path = project / "fixtures" / "checkpoints" / f"{name}.toml"
    path.write_text(edit(path.read_text()))


def test_a_cache_of_another_dtype_is_an_environments_fault(run_gate: RunGate) -> None:
    """vLLM takes a bfloat16 cache for a float32 engine on CPU, and computes nonsense silently."""
    change(
        run_gate.project,
        "tiny-llama-w4a16",
        lambda text: f'{text}kv_cache_dtype = "bfloat16"\n',
    )
    result = run_gate("suites", "-k", "replay and float32", "--gate-report", "report")
    assert result.returncode == 1, result.stdout
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert check["verdict"] == "fail"
    assert check["attribution"].startswith("ENVIRONMENT: the unquantized base")
    assert "self_attn.o_proj: output" in result.stdout
    assert "Traceback" not in result.stdout


def seven_bits(source: Path, target: Path) -> None:
    """Write a checkpoint's like with weights within ±64: pairs of products do not saturate."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = (tensor.float() / 2).round().to(torch.int8)
        elif name.endswith("weight_scale"):
            tensors[name] = tensor * 2
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def native_int8(run_gate: RunGate, root: Path, *, known: bool) -> None:
    """Gate vLLM's own int8 kernel, with or without its known failures on file."""
    name = "tiny-llama-w8a8-native"
    text = (root / "fixtures" / "checkpoints" / f"{name}.toml").read_text()
    path = run_gate.project / "fixtures" / "checkpoints" / f"{name}.toml"
    path.write_text(text if known else text.partition("[[known_failure]]")[0])
    run_gate.remove_its_checkpoint()


# As a processor without VNNI, and without AMX, whose kernels are not oneDNN's.
NO_VNNI = environment_of("avx2", None, flags())


def test_int8_products_that_saturate_fail_and_are_the_engines_fault(
    run_gate: RunGate, root: Path, tmp_path: Path
) -> None:
    native_int8(run_gate, root, known=False)
    seven_bits(root / "build" / "tiny-llama-w8a8", tmp_path / "seven-bits")
    text = (
        run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w8a8-native.toml"
    ).read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("revision", "source"))]
    path = run_gate.project / "fixtures" / "checkpoints" / "seven-bits.toml"
    path.write_text("\n".join([f'source = "{tmp_path / "seven-bits"}"', *lines]) + "\n")
    few = "float32 and not invariance"
    result = run_gate("suites", "-k", few, "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 1, result.stdout
    seven, eight = run_gate.report["checkpoints"]
    assert seven["verdict"] == "pass"
    checks = {check["name"]: check for check in eight["checks"]}
    for check in checks.values():
        assert check["verdict"] == "fail"
        assert check["attribution"].startswith("ENGINE: both dequantizers agree on every weight")
        assert "CPUInt8ScaledMMLinearKernel" in check["kernels"].values()
    assert checks["replay-float32"]["measured"] > 1e-3
    assert "module     model.layers." in result.stdout
    assert "CPUInt8ScaledMMLinearKernel" in result.stdout


def test_a_known_failure_is_shown_and_does_not_count(run_gate: RunGate, root: Path) -> None:
    native_int8(run_gate, root, known=True)
    few = "fidelity or replay"
    result = run_gate("suites", "-k", few, "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 0, result.stdout
    (checks,) = [c["checks"] for c in run_gate.report["checkpoints"]]
    failed = {check["name"]: check for check in checks if check["verdict"] == "fail"}
    assert set(failed) >= {"fidelity-float32", "replay-float32", "replay-serving"}
    assert all("VNNI" in check["known_failure"] for check in failed.values())
    assert run_gate.report["verdict"] == "pass"
    assert "FAIL (known)" in result.stdout
    assert 'skipped type="known-failure"' in (run_gate.project / "report/junit.xml").read_text()


def test_a_known_failure_that_is_gone_is_a_failure(run_gate: RunGate, root: Path) -> None:
    """Unless it is said to be one that may pass."""
    native_int8(run_gate, root, known=True)
    change(
        run_gate.project,
        "tiny-llama-w8a8-native",
        lambda text: text.replace('"native"', '"portable"'),
    )
    few = "serving and not invariance"
    result = run_gate("suites", "-k", few, "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 1
    assert "it passes, but is listed as a known failure" in result.stdout
    ((fidelity, replay),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert (fidelity["name"], fidelity["verdict"]) == ("fidelity-serving", "pass")
    assert (replay["name"], replay["verdict"]) == ("replay-serving", "fail")

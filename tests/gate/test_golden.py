"""tools/regen_golden.py, and gate runs against goldens."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from damage import sealed
from harness import RunGate, persons_environment
from preloaded import run_python

from quantgate.judging.golden import (
    CHECKSUM,
    from_json,
    to_json,
)
from quantgate.subject.probe import Probe

pytestmark = pytest.mark.long


def regenerate(project: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        "tools/regen_golden.py", *arguments, cwd=project, env={**persons_environment(), **more}
    )


W4A16 = ("--checkpoint", "tiny-llama-w4a16", "--reason", "because")


@pytest.fixture
def tooled(project: Path, root: Path) -> Path:
    shutil.copytree(root / "tools", project / "tools")
    return project


def files_of(project: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (project / "golden").rglob("*") if path.is_file()}


def move_golden(path: Path, probe: Probe, by: float) -> None:
    """Make a golden of something else: scores that are `by` nat lower."""
    golden = from_json(path.read_text(), probe, path)
    moved = dataclasses.replace(golden.measurement, values=golden.measurement.values - by)
    path.write_text(to_json(dataclasses.replace(golden, measurement=moved), probe))


def test_the_tool_shows_old_and_new_and_keeps_the_history(tooled: Path, small_probe: Probe) -> None:
    """Of a golden that was taken of something else; one within tolerance stays as it is."""
    folder = tooled / "golden" / "tiny-llama-w4a16"
    path, other = folder / "drift-float32.cpu.json", folder / "drift-serving.cpu.json"
    move_golden(path, small_probe, 0.25)
    move_golden(other, small_probe, 1e-7)
    before, untouched = json.loads(path.read_text()), other.read_bytes()
    floor = folder / "noise-float32.cpu.json"
    taken = json.loads(floor.read_text())
    floor.unlink()

    files = files_of(tooled)
    shown = regenerate(tooled, *W4A16, "--dry-run")
    assert (shown.returncode, files_of(tooled)) == (0, files)
    assert "max |Δ log-prob| is 0.25" in shown.stdout

    result = regenerate(tooled, *W4A16)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(shown.stdout.split("\ngolden")[0])
    after = json.loads(path.read_text())
    assert other.read_bytes() == untouched
    assert "golden/tiny-llama-w4a16/drift-serving.cpu.json: within tolerance, kept" in result.stdout
    again = json.loads(floor.read_text())
    assert (again["key"], list(again["reruns"])) == (taken["key"], list(taken["reruns"]))
    old, new = before["measured"]["mean_nll"], after["measured"]["mean_nll"]
    assert f"  mean_nll {old:.9g} → {new:.9g}\n" in result.stdout
    assert after["history"][:-1] == before["history"]
    entry = after["history"][-1]
    assert (entry["reason"], entry["before"]["mean_nll"], entry["mean_nll"]) == (
        "because",
        old,
        new,
    )
    stored = {"schema", "key", "measured", "provenance", "files", "history", CHECKSUM}
    assert set(after) == stored


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--checkpoint", "tiny-lama", "--reason", "r"], {}, "--checkpoint tiny-lama: not an id"),
        (["--checkpoint", "tiny-llama-w4a16", "--reason", " "], {}, "--reason is empty"),
        (["--checkpoint", "tiny-llama-w4a16"], {}, "following arguments are required: --reason"),
        (["--reason", "r"], {}, "one of the arguments --checkpoint --all is required"),
        (W4A16, {"CI": "true"}, "takes no golden: a person looks at it"),
        (W4A16, {"PYTEST_XDIST_WORKER": "gw0"}, "takes no golden: a person looks at it"),
    ],
)
def test_the_tool_refuses_what_nobody_could_review(
    tooled: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    before = files_of(tooled)
    result = regenerate(tooled, *arguments, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert before == files_of(tooled)


@pytest.mark.parametrize("name", ["tiny-lama/drift-float32.cpu.json", "tiny-llama-w4a16/x.json"])
def test_a_golden_that_nothing_claims_is_an_error(tooled: Path, name: str) -> None:
    path = tooled / "golden" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    result = regenerate(tooled, *W4A16)
    assert (result.returncode, "no checkpoint file claims it" in result.stderr) == (2, True)
    result = RunGate(tooled)("suites", "-k", "quality")
    assert result.returncode == 4
    assert "no checkpoint file claims this golden" in result.stderr + result.stdout


def test_a_golden_of_something_else_is_refused_and_kept(tooled: Path) -> None:
    """Of another probe, and of native kernels where these are emulated."""
    folder = tooled / "golden" / "tiny-llama-w4a16"
    changes = {"drift-float32.cpu.json": ("key", "probe", "f" * 64),
               "drift-serving.cpu.json": ("provenance", "emulated", [])}  # fmt: skip
    for name, (part, field, value) in changes.items():
        content = json.loads((folder / name).read_text())
        content[part][field] = value
        (folder / name).write_text(sealed(content))
    before = files_of(tooled)
    result = regenerate(tooled, *W4A16)
    assert result.returncode == 1, result.stderr
    assert "refused: the golden is of probe ffffffffffff, this is " in result.stdout
    assert "refused: the golden is of native kernels, this of emulated ones" in result.stdout
    assert before == files_of(tooled)


@pytest.mark.slow(reason="imports vLLM anew, as another processor; one such test is enough")
def test_a_golden_holds_on_a_processor_without_vector_instructions(run_gate: RunGate) -> None:
    """Taken with AVX-512, compared with what torch and oneDNN do where they may use SSE4.1 only."""
    result = run_gate(
        "suites", "-k", "drift", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41"
    )
    assert result.returncode == 0, result.stdout


def test_a_golden_of_another_probe_is_not_run(run_gate: RunGate) -> None:
    path = run_gate.project / "golden" / "tiny-llama-w4a16" / "drift-float32.cpu.json"
    content = json.loads(path.read_text())
    content["key"]["probe"] = "f" * 64
    path.write_text(sealed(content))
    result = run_gate("suites", "-k", "drift and float32", "--gate-report", "report")
    assert result.returncode == 1
    ((check,),) = [checkpoint["checks"] for checkpoint in run_gate.report["checkpoints"]]
    assert check["verdict"] == "not-run"
    assert "is of probe ffffffffffff, not " in check["detail"]

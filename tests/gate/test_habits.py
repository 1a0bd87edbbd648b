"""What people do with pytest works on the gate: -x, --lf, -k, --co, -n and --junitxml."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from fake_engine import install
from harness import LLMCOMPRESSOR, RunGate, lacking

from quantgate.judging.golden import from_json, to_json
from quantgate.subject.probe import Probe

pytestmark = pytest.mark.long

FEW = "float32 and (replay or drift)"


def test_what_will_be_skipped_is_said_at_the_start(root: Path, tmp_path: Path) -> None:
    """With a browser on the path and without; of what a build lacks, the tool that makes it."""
    (browser := tmp_path / "bin" / "chromium").parent.mkdir()
    browser.write_text("#!/bin/sh\n")
    browser.chmod(0o755)
    command = [sys.executable, "-m", "pytest", "tests/unit/test_stats.py", "--co"]
    for path, said in ((tmp_path, True), (browser.parent, False)):
        environment = {**os.environ, "PATH": str(path)}
        header = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=True
        ).stdout.partition("collected")[0]
        assert ("skipped for want of chromium: apt-get install chromium" in header) is said
    assert "tools/make_llmcompressor.py" in lacking(tmp_path)["checkpoints by llm-compressor"]
    (tmp_path / LLMCOMPRESSOR).mkdir(parents=True)
    assert "checkpoints by llm-compressor" not in lacking(tmp_path)


def outcomes(run_gate: RunGate) -> dict[str, str]:
    (checkpoint,) = run_gate.report["checkpoints"]
    return {check["name"]: check["verdict"] for check in checkpoint["checks"]}


APPROVED = "golden/tiny-llama-w4a16/drift-float32.cpu.json"


@pytest.fixture
def approved(run_gate: RunGate, small_probe: Probe) -> str:
    """A golden's text, which has been replaced by one that only drift fails."""
    path: Path = run_gate.project / APPROVED
    text = path.read_text()
    golden = from_json(text, small_probe, path)
    moved = replace(golden.measurement, values=golden.measurement.values - 0.25)
    path.write_text(to_json(replace(golden, measurement=moved), small_probe))
    return text


REPORT = ("--gate-report", "report")


def test_stop_at_a_failure_and_run_the_last_ones_again(run_gate: RunGate, approved: str) -> None:
    listed = run_gate("suites", "-k", FEW, "--co", "-q", *REPORT)
    assert listed.returncode == 0
    assert "test_drift[tiny-llama-w4a16-cpu-float32]" in listed.stdout
    assert not (run_gate.project / "report").exists()  # nothing was judged

    whole = run_gate("suites", "-k", FEW, "--junitxml", "own.xml", *REPORT)
    assert whole.returncode == 1
    assert outcomes(run_gate) == {"replay-float32": "pass", "drift-float32": "fail"}
    (suite,) = ElementTree.parse(run_gate.project / "own.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")

    first = run_gate("suites", "-k", FEW, "-x", "--ff", *REPORT)
    assert first.returncode == 1
    assert outcomes(run_gate) == {"drift-float32": "fail", "replay-float32": "not-run"}
    assert "the run ended before its test" in (run_gate.project / "report/gate.md").read_text()

    again = run_gate("suites", "-k", FEW, "--lf", *REPORT)
    assert again.returncode == 1
    assert outcomes(run_gate) == {"drift-float32": "fail"}

    (run_gate.project / APPROVED).write_text(approved)
    mended = run_gate("suites", "-k", FEW, "--lf", *REPORT)
    assert mended.returncode == 0, mended.stdout
    assert outcomes(run_gate) == {"drift-float32": "pass"}


@pytest.mark.slow(reason="two workers that each import vLLM")
def test_two_workers_run_the_last_ones_again(run_gate: RunGate, approved: str) -> None:
    assert run_gate("suites", "-k", FEW, "-n", "2", *REPORT).returncode == 1
    (run_gate.project / APPROVED).write_text(approved)
    mended = run_gate("suites", "-k", FEW, "--lf", "-n", "2", *REPORT)
    assert mended.returncode == 0, mended.stdout
    assert outcomes(run_gate) == {"drift-float32": "pass"}


@pytest.mark.parametrize(
    ("warn", "status"),
    [("a library", 0), ("our own code", 1)],
    ids=["a library's", "our own"],
)
def test_what_a_library_is_warned_of_is_no_verdict(
    run_gate: RunGate, warn: str, status: int
) -> None:
    """A driver, a GPU or a newer version has others; what our own code does wrong is an error."""
    install(run_gate.project)
    fault = f"warn as {warn} does"
    done = run_gate("suites", "-k", "fidelity and float32", "--gate-report", "report", FAULT=fault)
    assert done.returncode == status, done.stdout
    assert outcomes(run_gate) == {"fidelity-float32": "not-run" if status else "pass"}

"""Goldens: what is stored, what damage is noticed, and the one tool that writes them."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import RunGate, persons_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from preloaded import run_python

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput
from quantgate.judging import approval
from quantgate.judging import golden as stored
from quantgate.judging.approval import Proposal
from quantgate.judging.golden import (
    CHECKSUM,
    SKETCH,
    Golden,
    GoldenKey,
    as_stored,
    from_json,
    to_json,
)
from quantgate.measuring.measurement import Measurement, Provenance, pooled
from quantgate.measuring.sources import Sources
from quantgate.patches.scoremode import logprob
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe, Window

PROVENANCE = Provenance("engine", "cpu", "cpu", "float32", {"lm_head": "X"}, ("X",), {"torch": "2"})


def probe_of(lengths: list[int]) -> Probe:
    """Windows of these lengths; the same document holds every third of them."""
    return Probe(
        "p",
        50,
        tuple(Window(f"d{i % 3}", "s", 1, tuple(range(n)), "") for i, n in enumerate(lengths)),
    )


def golden_of(probe: Probe, seed: int = 0) -> Golden:
    generator = np.random.default_rng(seed)
    measurement = Measurement(
        generator.normal(size=probe.scored).astype(np.float32),
        generator.integers(0, 50, probe.scored).astype(np.int32),
        PROVENANCE,
    )
    key = GoldenKey("0" * 64, probe.sha256, "cpu", "float32", "auto", "portable")
    return Golden(key, measurement, ({"date": "2026-01-01", "reason": "r"},))


def sealed(content: dict[str, Any]) -> str:
    """Return a golden's text with the checksum that belongs to it."""
    return json.dumps({**content, CHECKSUM: stored._checksum(content)})


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_golden_reads_back_bit_for_bit(lengths: list[int], seed: int) -> None:
    probe = probe_of(lengths)
    golden = golden_of(probe, seed)
    found = from_json(to_json(golden, probe), probe, "x.json")
    assert found.key == golden.key
    assert found.history == golden.history
    assert found.measurement.logprob.tobytes() == golden.measurement.logprob.tobytes()
    assert found.measurement.top1.tobytes() == golden.measurement.top1.tobytes()
    assert found.measurement.provenance == dataclasses.replace(PROVENANCE, source="golden")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-40], "damaged"),
        (lambda text: text.replace('"identity"', '"identify"'), "its sha256 is not that of what"),
        (lambda text: text.replace('"schema": 2', '"schema": 9'), "schema 9"),
        (
            lambda text: text.replace('"logprob": "', '"logprob": "!'),
            "its sha256 is not that of what",
        ),
        (
            lambda text: sealed(json.loads(text.replace('"logprob": "', '"logprob": "!'))),
            "damaged",
        ),
        (
            lambda text: re.sub(r'"mean_nll": -?', '"mean_nll": 9', text),
            "its sha256 is not that of what it holds",
        ),
        (lambda _: "[]", "damaged"),
    ],
)
def test_damage_is_noticed_and_named(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    probe = probe_of([5, 5, 5])
    with pytest.raises(BadInput, match=message) as error:
        from_json(damage(to_json(golden_of(probe), probe)), probe, "x.json")
    assert str(error.value).startswith("x.json: ")


def test_a_figure_that_another_processor_computed_is_no_damage() -> None:
    """`exp` and means of the same values differ in their last bit from machine to machine."""
    probe = probe_of([5, 5, 5])
    content = json.loads(to_json(golden_of(probe), probe))
    figure = content["measured"]["perplexity"]
    content["measured"]["perplexity"] = float(np.nextafter(figure, np.inf))
    golden = from_json(sealed(content), probe, "x.json")
    assert golden.measurement.logprob.tobytes() == golden_of(probe).measurement.logprob.tobytes()


@pytest.mark.parametrize("width", [1, 5, SKETCH, SKETCH + 1, 200])
def test_outputs_of_models_that_pool_are_kept_whole_or_as_a_sketch(width: int) -> None:
    probe = dataclasses.replace(probe_of([5, 3, 9]), task="token_embed")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(probe.scored, width)).astype(np.float32)
    provenance = Provenance("engine", "cpu", "cpu", "float32")
    kept = as_stored(pooled(values, provenance))
    assert kept.values.shape == (probe.scored, min(width, SKETCH))
    golden = Golden(golden_of(probe).key, kept, ())
    found = from_json(to_json(golden, probe), probe, "x.json").measurement
    assert found.values.tobytes() == kept.values.tobytes()
    assert found.top1.tolist() == kept.top1.tolist()
    # A change of one component of one row is seen in what is kept, about as large.
    moved = values.copy()
    moved[3, width // 2] += 0.5
    change = np.abs(as_stored(pooled(moved, provenance)).values - kept.values)
    assert np.flatnonzero(change.max(axis=1)).tolist() == [3]
    assert change.max() == pytest.approx(0.5 / (width**0.5 if width > SKETCH else 1), rel=1e-3)
    damaged = re.sub(r'"rms": \d', '"rms": 9', to_json(golden, probe))
    with pytest.raises(BadInput, match="its sha256 is not that of what it holds"):
        from_json(damaged, probe, "x.json")


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "golden.json"
    write_atomically(path, "old")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["golden.json"]


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
    assert set(after) == {"schema", "key", "measured", "provenance", "history", CHECKSUM}


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


def test_what_fails_fidelity_is_refused_or_recorded(
    project: Path, small_probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = logprob.score_rows

    def shifted(head: Any, hidden: Any, targets: Any) -> Any:
        found = honest(head, hidden, targets)
        return found._replace(logprob=found.logprob - 1e-3)

    monkeypatch.setattr(logprob, "score_rows", shifted)
    sources = Sources(lambda _task, _quality: small_probe, lambda _: None)
    known = read_checkpoint_files(project)["tiny-llama-w4a16"]

    def propose(*, accept: bool) -> Proposal:
        return approval.propose(sources, known, "float32", "r", accept_failing=accept)

    refused = propose(accept=False)
    assert refused.refusals[0].startswith("fidelity-float32 is fail (")
    assert approval.write(sources, known, "float32", refused) == []
    accepted = propose(accept=True)
    assert accepted.refusals == ()
    assert not accepted.within_tolerance
    assert "fidelity-float32 fail" in accepted.new.history[-1]["accepted_failing"]


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

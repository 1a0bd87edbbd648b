"""Shards of a gate run, merged: the same report as one run's, on real checkpoints and engines."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import RunGate, project_of
from preloaded import run_python

pytestmark = pytest.mark.long

FIVE = (
    "tiny-llama-fp8",
    "tiny-llama-w4a16",
    "tiny-llama-w8a8",
    "tiny-ner-bert-w8a8",
    "tiny-qwen3-w8a8",
)
EIGHT = (*FIVE, "tiny-llama-fp8-kv", "tiny-llama-nvfp4a16", "tiny-reward-qwen2-w4a16")
# The audit of files starts no engine.
FILES_ONLY = ["-k", "audit and not loaded and not seen"]


def quantgate(project: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "quantgate", *words, cwd=project, env={**os.environ, **environment})


def report(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "gate.json").read_text()))


def but_for_times(content: dict[str, Any]) -> dict[str, Any]:
    """Leave out times, and engines: what is cached already is not measured again."""
    return {k: v for k, v in content.items() if k not in ("started", "duration_s", "engines")}


@pytest.fixture
def five(project: Path, root: Path) -> Path:
    return project_of(project, root, *FIVE)


def test_three_shards_are_one_run(five: Path) -> None:
    whole = quantgate(five, "gate", "--report", "whole", "--", *FILES_ONLY)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    judged: list[str] = []
    for number in (1, 2, 3):
        done = quantgate(five, "gate", "--shard", f"{number}/3", "--", *FILES_ONLY)
        assert done.returncode == 0, done.stdout + done.stderr
        own = FIVE[number - 1 :: 3]
        said = f"quantgate: shard {number}/3 judges {len(own)} of 5 checkpoints: {', '.join(own)}"
        assert said in done.stdout
        found = report(five / "report" / f"shard-{number}-of-3")
        asked = {"-k": FILES_ONLY[1]}
        assert found["shard"] == {
            "number": number, "of": 3, "checkpoints": list(FIVE), "asked": asked,
        }  # fmt: skip
        assert [one["id"] for one in found["checkpoints"]] == list(own)
        judged += own
    assert sorted(judged) == list(FIVE)
    directories = [f"report/shard-{number}-of-3" for number in (3, 1, 2)]
    merged = quantgate(five, "merge", *directories, "--report", "merged")
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert but_for_times(report(five / "merged")) == but_for_times(report(five / "whole"))
    without_times = r' time="[^"]*"'
    junit = [(five / name / "junit.xml").read_text() for name in ("merged", "whole")]
    assert len({re.sub(without_times, "", text) for text in junit}) == 1
    assert (five / "merged" / "gate.md").read_text() == (five / "whole" / "gate.md").read_text()
    # Without the second, or with one that ended early, its checkpoints are not run.
    merged = quantgate(five, "merge", directories[0], directories[1], "--report", "partial")
    assert merged.returncode == 1
    assert "note: shard 2/3 is missing, so its checkpoints were not run" in merged.stdout
    verdicts = {one["id"]: one["verdict"] for one in report(five / "partial")["checkpoints"]}
    missing = FIVE[1::3]
    assert verdicts == {name: "not-run" if name in missing else "pass" for name in FIVE}


def test_a_task_of_a_job_array_is_a_shard_only_if_asked(five: Path) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "6", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "7"}
    words = ["gate", "--report", "out", "--shard", "slurm", "--", *FILES_ONLY]
    done = quantgate(five, *words, **task)
    assert done.returncode == 0, done.stdout + done.stderr
    said = "quantgate: shard 7/7 has nothing to judge: the selection has 5 checkpoints"
    assert said in done.stdout
    found = report(five / "out" / "shard-7-of-7")
    assert (found["checkpoints"], found["shard"]["checkpoints"]) == ([], list(FIVE))
    # An array may be of something else.
    words = ["gate", "tiny-qwen3-w8a8", "--", *FILES_ONLY]
    done = quantgate(five, *words, **task)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shard" not in done.stdout
    assert report(five / "report")["shard"] is None


@pytest.mark.parametrize("number", [1, 6])
def test_a_shard_with_several_workers(five: Path, number: int) -> None:
    words = ["gate", "--shard", f"{number}/6", "--", "-n", "2", *FILES_ONLY]
    done = quantgate(five, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report(five / "report" / f"shard-{number}-of-6")
    assert [one["id"] for one in found["checkpoints"]] == list(FIVE[number - 1 :: 6])


def test_a_shard_that_cannot_judge_leaves_no_result(five: Path) -> None:
    """An earlier result of it must not be taken for this one."""
    shard = five / "report" / "shard-1-of-5"
    words = ["gate", "--shard", "1/5", "--", *FILES_ONLY]
    assert quantgate(five, *words).returncode == 0
    assert (shard / "results.json").is_file()
    file = five / "fixtures" / "checkpoints" / "tiny-llama-fp8.toml"
    file.write_text(file.read_text().replace('scheme = "FP8"', 'scheme = "W8A8"'))
    done = quantgate(five, *words)
    assert done.returncode == 4, done.stdout + done.stderr
    assert not (shard / "results.json").exists()
    # It is another shard's business what is wrong with this one's checkpoints.
    assert quantgate(five, *words[:2], "2/5", *words[3:]).returncode == 0
    merged = quantgate(five, "merge", "report/shard-1-of-5", "report/shard-2-of-5")
    assert merged.returncode == 1
    assert "report/shard-1-of-5: no results.json, so this shard did not finish" in merged.stdout


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "slurm"])
def test_what_is_no_shard_is_one_sentence(run_gate: RunGate, shard: str) -> None:
    done = run_gate("suites", "--shard", shard, "--gate-report", "report")
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    assert line.startswith(f"ERROR: --shard {shard}: ")
    assert not (run_gate.project / "report").exists()


@pytest.mark.slow(reason="eight checkpoints, each judged twice with every check")
def test_eight_checkpoints_with_every_check(project: Path, root: Path) -> None:
    project_of(project, root, *EIGHT)
    (project / "suites" / "test_seen.py").unlink()
    more = ["-k", "not tensor and not compiled"]
    assert quantgate(project, "gate", "--report", "whole", "--", *more).returncode == 0
    for number in (1, 2, 3):
        # A machine of its own has a cache of its own.
        words = ["--", "--gate-cache", f"cache-{number}", *more]
        assert quantgate(project, "gate", "--shard", f"{number}/3", *words).returncode == 0
    directories = [f"report/shard-{number}-of-3" for number in (1, 2, 3)]
    assert quantgate(project, "merge", *directories, "--report", "merged").returncode == 0
    merged, whole = (report(project / name) for name in ("merged", "whole"))
    assert [one["id"] for one in merged["checkpoints"]] == sorted(EIGHT)
    assert but_for_times(merged) == but_for_times(whole)

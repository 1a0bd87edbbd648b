"""Shards of a gate run, merged: the same report as one run's, on real checkpoints and engines."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import EIGHT, FIVE, but_for_times, project_of
from preloaded import run_python

pytestmark = pytest.mark.long

# The audit of files starts no engine.
FILES_ONLY = "-- -k 'audit and not loaded and not seen'"
# One process for many commands, because starting one takes longer than what is tested.
MAIN = """
import glob, json, os, shlex, sys
from quantgate.__main__ import main
sys.stderr = sys.stdout
for line in json.loads(sys.argv[1]):
    words = shlex.split(line)
    while "=" in words[0]:
        name, _, os.environ[name] = words.pop(0).partition("=")
    words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    print(f"\\n=== {main(words)}", flush=True)
"""


class Done(NamedTuple):
    status: int
    said: str


def quantgate(project: Path, *lines: str) -> list[Done]:
    """Run command lines one after the other in a project; each may begin with NAME=value."""
    done = run_python("-c", MAIN, json.dumps(lines), cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    *said, _ = re.split(r"\n=== (\d+)\n", done.stdout)
    return [Done(int(status), text) for text, status in zip(said[::2], said[1::2], strict=True)]


def gate_shard(name: str, more: str = "") -> str:
    return f"gate --shard {name} {FILES_ONLY} {more}"


def report(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "gate.json").read_text()))


@pytest.fixture
def five(project: Path, root: Path) -> Path:
    return project_of(project, root, *FIVE)


def test_three_shards_are_one_run(five: Path, root: Path) -> None:
    document = (root / "docs" / "many-machines.md").read_text(encoding="utf-8")
    *gates, merge, _ = re.findall(r"^    quantgate (.*)$", document, re.MULTILINE)  # the last: Ray
    assert gates == [f"gate --shard {number}/3" for number in (1, 2, 3)]
    whole, *shards, merged, partial = quantgate(
        five,
        f"gate --report whole {FILES_ONLY}",
        *(f"{line} {FILES_ONLY}" for line in gates),
        merge,
        "merge report/shard-3-of-3 report/shard-1-of-3 --report partial",
    )
    assert (whole.status, merged.status, partial.status) == (0, 0, 1), merged.said
    for number, shard in enumerate(shards, start=1):
        own = FIVE[number - 1 :: 3]
        said = f"quantgate: shard {number}/3 judges {len(own)} of 5 checkpoints: {', '.join(own)}"
        assert said in shard.said
        assert shard.status == 0
        found = report(five / "report" / f"shard-{number}-of-3")
        assert [one["id"] for one in found["checkpoints"]] == list(own)
        assert found["shard"] == {
            "number": number, "of": 3, "checkpoints": list(FIVE),
            "asked": {"-k": "audit and not loaded and not seen"},
        }  # fmt: skip
    assert but_for_times(report(five / "report")) == but_for_times(report(five / "whole"))
    junit = [(five / name / "junit.xml").read_text() for name in ("report", "whole")]
    assert len({re.sub(r' time="[^"]*"', "", text) for text in junit}) == 1
    assert (five / "report" / "gate.md").read_text() == (five / "whole" / "gate.md").read_text()
    missing = FIVE[1::3]
    said = f"note: shard 2/3 is missing, so its checkpoints were not run: {', '.join(missing)}"
    assert said in partial.said
    verdicts = {one["id"]: one["verdict"] for one in report(five / "partial")["checkpoints"]}
    assert verdicts == {name: "not-run" if name in missing else "pass" for name in FIVE}


def test_a_task_of_a_job_array_is_a_shard_only_if_asked(five: Path) -> None:
    task = "SLURM_ARRAY_TASK_ID=6 SLURM_ARRAY_TASK_MIN=0 SLURM_ARRAY_TASK_COUNT=7"
    empty, other = quantgate(
        five,
        f"{task} gate --report out --shard slurm {FILES_ONLY}",
        f"gate tiny-qwen3-w8a8 {FILES_ONLY}",  # what the array is of need not be shards
    )
    assert empty.status == 0, empty.said
    said = "quantgate: shard 7/7 has nothing to judge: the selection has 5 checkpoints"
    assert said in empty.said
    found = report(five / "out" / "shard-7-of-7")
    assert (found["checkpoints"], found["shard"]["checkpoints"]) == ([], list(FIVE))
    assert other.status == 0, other.said
    assert "shard" not in other.said
    assert report(five / "report")["shard"] is None


def test_a_shard_that_cannot_judge_leaves_no_result(five: Path) -> None:
    """Not even an earlier one, which would be taken for this one's."""
    earlier = five / "report" / "shard-1-of-5" / "results.json"
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    file = five / "fixtures" / "checkpoints" / "tiny-llama-fp8.toml"
    file.write_text(file.read_text().replace('scheme = "FP8"', 'scheme = "W8A8"'))
    refused, now, other, merged = quantgate(
        five,
        gate_shard("6/5"),
        gate_shard("1/5"),
        gate_shard("2/5"),
        "merge report/shard-1-of-5 report/shard-2-of-5",
    )
    (line,) = [line for line in refused.said.splitlines() if line.strip()]
    assert line == "ERROR: --shard 6/5: the shards of 5 are 1/5 to 5/5."
    assert (refused.status, now.status, other.status, merged.status) == (4, 4, 0, 1)
    assert not earlier.exists()
    assert "report/shard-1-of-5: no results.json, so this shard did not finish" in merged.said


@pytest.mark.slow(reason="xdist's workers each import vLLM")
@pytest.mark.parametrize("number", [1, 6])
def test_a_shard_with_several_workers(five: Path, number: int) -> None:
    (done,) = quantgate(five, gate_shard(f"{number}/6", "-n 2"))
    assert done.status == 0, done.said
    found = report(five / "report" / f"shard-{number}-of-6")
    assert [one["id"] for one in found["checkpoints"]] == list(FIVE[number - 1 :: 6])


@pytest.mark.slow(reason="eight checkpoints, each judged twice with every check")
def test_eight_checkpoints_with_every_check(project: Path, root: Path) -> None:
    project_of(project, root, *EIGHT)
    (project / "suites" / "test_seen.py").unlink()
    few = "-k 'not tensor and not compiled'"
    # The shards share a cache, which begins as empty as the other run's.
    whole, *_, merged = quantgate(
        project,
        f"gate --report whole -- {few}",
        *(f"gate --shard {n}/3 -- --gate-cache cache-of-shards {few}" for n in (1, 2, 3)),
        "merge report/shard-1-of-3 report/shard-2-of-3 report/shard-3-of-3 --report merged",
    )
    ours, theirs = (report(project / name) for name in ("merged", "whole"))
    assert [one["id"] for one in ours["checkpoints"]] == sorted(EIGHT)
    # On a small probe a check may be inconclusive; then it is so in both.
    assert {one["verdict"] for one in ours["checkpoints"]} <= {"pass", "inconclusive"}, merged.said
    assert merged.status == whole.status == (ours["verdict"] != "pass")
    assert ours["engines"]
    assert but_for_times(ours) == but_for_times(theirs)

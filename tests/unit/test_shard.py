"""Shards: who judges what, results that return as they were, and what cannot be merged."""

import itertools
import json
import math
import os
import re
import shlex
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_runs import PROBE, run_of

from quantgate.__main__ import main, parse
from quantgate.errors import BadInput
from quantgate.measuring.engine import EngineLife
from quantgate.reporting.gate_json import gate_json
from quantgate.reporting.merge import RESULTS, merge, read_results, results_json
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard, parse_shard
from quantgate.reporting.write import write_reports

IDS = ("a", "b", "c", "d", "e")


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """The directories of three shards of five checkpoints."""
    return [write(tmp_path, run_of(Shard(number, 3, IDS))) for number in (1, 2, 3)]


def write(folder: Path, run: Run) -> Path:
    assert run.shard is not None
    write_reports(run, folder / run.shard.folder)
    return folder / run.shard.folder


@pytest.mark.parametrize("of", [1, 2, 3, 5, 8])
def test_shards_judge_every_checkpoint_once(of: int) -> None:
    parts = [Shard(number, of, IDS).own for number in range(1, of + 1)]
    assert sorted(itertools.chain(*parts)) == list(IDS)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_line_says_what_a_shard_judges() -> None:
    assert str(Shard(2, 3, IDS)) == "shard 2/3 judges 2 of 5 checkpoints: b, e"
    assert (
        str(Shard(4, 4, ("a",))) == "shard 4/4 has nothing to judge: the selection has 1 checkpoint"
    )


@pytest.mark.parametrize(
    ("task", "least", "step", "place"), [(1, 1, 1, 1), (0, 0, 1, 1), (7, 5, 1, 3), (20, 10, 5, 3)]
)
def test_a_job_array_may_begin_with_any_number(
    task: int, least: int, step: int, place: int
) -> None:
    given = {"ID": task, "COUNT": 3, "MIN": least, "STEP": step}
    variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in given.items()}
    assert parse_shard("slurm", variables) == (place, 3)


@pytest.mark.parametrize(
    ("text", "environment", "message"),
    [
        ("2", {}, "--shard 2: give I/N, such as 1/3"),
        ("0/3", {}, "--shard 0/3: the shards of 3 are 1/3 to 3/3"),
        ("4/3", {}, "--shard 4/3: the shards of 3 are 1/3 to 3/3"),
        ("1/0", {}, "--shard 1/0: "),
        ("slurm", {}, "this is no task of a job array"),
        ("slurm", {"ID": "7", "COUNT": "3"}, "SLURM_ARRAY_TASK_ID=7 has no place among 3 tasks"),
        ("slurm", {"ID": "0", "COUNT": "3"}, "SLURM_ARRAY_TASK_ID=0 has no place among 3 tasks"),
    ],
)
def test_what_is_no_shard_is_refused(text: str, environment: dict[str, str], message: str) -> None:
    variables = {f"SLURM_ARRAY_TASK_{name}": value for name, value in environment.items()}
    with pytest.raises(BadInput) as refused:
        parse_shard(text, variables)
    assert message in str(refused.value)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    run = run_of(Shard(1, 3, IDS, {"-k": "quality"}))
    (tmp_path / RESULTS).write_text(results_json(run))
    found = read_results(tmp_path / RESULTS)
    assert math.isnan(found.results[0].verdict.deviations[0].floor or 0)
    assert results_json(found) == results_json(run)
    assert [type(life) for life in found.engines] == [EngineLife, EngineLife]
    # NaN equals nothing: all else is equal as values, not only as text.
    kept = [replace(r, verdict=replace(r.verdict, deviations=())) for r in found.results]
    assert kept == [replace(r, verdict=replace(r.verdict, deviations=())) for r in run.results]


def test_merged_shards_are_one_run(shards: list[Path], tmp_path: Path) -> None:
    run = merge(reversed(shards), tmp_path)
    assert [one.checkpoint for one in run.results] == list(IDS)
    assert (run.released, run.shard, run.notes) == (True, None, ["a note"])
    assert set(run.tiers) == set(run.histories) == set(IDS)
    whole = replace(run_of(Shard(1, 1, IDS)), shard=None)
    for directory, one in (("merged", run), ("whole", whole)):
        write_reports(one, tmp_path / directory)
    for name in ("gate.json", "gate.md", "junit.xml"):
        merged, expected = (tmp_path / d / name for d in ("merged", "whole"))
        assert merged.read_text() == expected.read_text(), name
    assert not (tmp_path / "merged" / RESULTS).exists()


def test_a_missing_shard_is_not_run(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fixtures" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "b.toml").write_text('source = "./b"\nscheme = "W8A8"\ntask = "token_embed"\n')
    (shards[1] / RESULTS).unlink()
    words = ["merge", *map(str, shards), "--report", str(tmp_path / "all"), "--project"]
    assert main([*words, str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "note: shard 2/3 is missing, so its checkpoints were not run: b, e" in said
    assert f"note: {shards[1]}: no {RESULTS}, so this shard did not finish" in said
    report = json.loads((tmp_path / "all" / "gate.json").read_text())
    found = {one["id"]: one for one in report["checkpoints"]}
    assert (report["verdict"], list(found)) == ("not-run", list(IDS))
    assert [found[name]["verdict"] for name in IDS] == [
        "pass", "not-run", "pass", "pass", "not-run",
    ]  # fmt: skip
    assert (found["b"]["scheme"], found["b"]["task"]) == ("W8A8", "token_embed")
    assert (found["e"]["scheme"], found["e"]["task"]) == ("unknown", "generate")
    assert "no results of shard 2/3" in found["e"]["checks"][0]["detail"]
    assert 'errors="1"' in (tmp_path / "all" / "junit.xml").read_text()


def test_a_shard_without_a_checkpoint_is_no_missing_one(tmp_path: Path) -> None:
    directories = [write(tmp_path, run_of(Shard(n, 3, ("a", "b")))) for n in (1, 2, 3)]
    assert json.loads((directories[2] / "gate.json").read_text())["checkpoints"] == []
    assert "shard 3/3 has nothing to judge" in (directories[2] / "index.html").read_text()
    assert merge(directories, tmp_path).released
    assert not merge(directories[1:], tmp_path).released
    # But it is named where its results are not there.
    assert "shard 3/3 is missing" in merge(directories[:2], tmp_path).notes[0]


def test_times_span_all_shards_and_machines_are_all_named(tmp_path: Path) -> None:
    late = replace(
        run_of(Shard(2, 2, IDS), "2026-11-27T10:02:00+00:00", 30.5),
        environment={"vllm": "0.31.0", "machine": "x86_64"},
    )
    run = merge([write(tmp_path, run_of(Shard(1, 2, IDS))), write(tmp_path, late)], tmp_path)
    assert (run.started, run.duration_s) == ("2026-11-27T10:00:00+00:00", 150.5)
    assert run.environment == {"vllm": "0.32.0 and 0.31.0", "machine": "x86_64"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run_of(Shard(2, 4, IDS)), "is shard 2/4, but "),
        (run_of(Shard(2, 3, IDS[:4])), "has the selection a, b, c, d, but "),
        (run_of(Shard(2, 3, IDS, {"-k": "quality"})), "was run with -k quality, but "),
        (run_of(Shard(1, 3, IDS), duration_s=61), "shard 1/3 again, with other results than "),
        (replace(run_of(Shard(2, 3, IDS)), shard=None), "a whole run, not a shard"),
    ],
)
def test_what_is_no_part_of_the_selection_is_refused(
    tmp_path: Path, other: Run, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path, run_of(Shard(1, 3, IDS)))
    (second := tmp_path / "second").mkdir()
    (second / RESULTS).write_text(results_json(other))
    words = ["merge", str(first), str(second), "--report", str(tmp_path / "all")]
    assert main(words) == 4
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("change", "merged"),
    [
        ({"sha256": "9" * 64, "tokens": 7}, True),  # of another tier
        ({"name": "tiny-retokenized", "sha256": "9" * 64}, True),
        ({"name": "steps", "file_sha256": "9" * 64}, True),
        ({"file_sha256": "9" * 64}, False),
        ({"name": "tiny-retokenized", "file_sha256": "9" * 64}, False),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_different_probes_of_one_name_are_not_merged(
    shards: list[Path], tmp_path: Path, change: dict[str, Any], merged: bool, number: int
) -> None:
    shard, probe = Shard(number, 3, IDS), replace(PROBE, **change)
    run = run_of(shard)
    write(tmp_path, replace(run, results=[replace(r, probes=(probe,)) for r in run.results]))
    if merged:
        report = json.loads(gate_json(merge(shards, tmp_path)))
        scored = [one["probes"] for one in report["checkpoints"]]
        assert scored == [[asdict(probe if name in shard.own else PROBE)] for name in IDS]
        return
    with pytest.raises(BadInput, match=r"has scored a probe 'tiny' whose file has the sha256 "):
        merge(shards, tmp_path)


def test_the_same_results_twice_are_merged_once(shards: list[Path], tmp_path: Path) -> None:
    (copy := tmp_path / "copy").mkdir()
    (copy / RESULTS).write_bytes((shards[0] / RESULTS).read_bytes())
    assert merge([*shards, copy, shards[0]], tmp_path) == merge(shards, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"quantgate": "0.0.1", "run": {}}', "quantgate 0.0.1 has judged this and "),
        ("{", "not the results of a shard"),
        ("[]", "not the results of a shard"),
        ('{"run": {}}', "not the results of a shard (KeyError: 'quantgate')"),
        (None, "not the results of a shard"),
    ],
)
def test_what_no_shard_of_this_version_has_written_is_refused(
    shards: list[Path], tmp_path: Path, content: str | None, message: str
) -> None:
    path = shards[0] / RESULTS
    damaged = path.read_text().replace('"outcome": "pass"', '"outcome": "passed"')
    path.write_text(damaged if content is None else content)
    with pytest.raises(BadInput) as refused:
        merge(shards, tmp_path)
    assert str(refused.value).startswith(f"{path}: {message}")


def test_nothing_to_merge_and_a_report_onto_a_shard_are_refused(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(tmp_path / "nowhere"), "--report", str(tmp_path / "all")]) == 4
    assert "no such file, so there is nothing to merge" in capsys.readouterr().err
    assert main(["merge", *map(str, shards), "--report", str(shards[1])]) == 4
    assert "a shard's results are there" in capsys.readouterr().err


@pytest.fixture
def document(root: Path) -> str:
    return (root / "docs" / "many-machines.md").read_text(encoding="utf-8")


def test_the_job_array_of_the_document(document: str, tmp_path: Path) -> None:
    """Its scripts, with an `sbatch` that runs what is wrapped, and a `quantgate` that is noted."""
    script, submit = re.findall(r"```sh\n(.*?)```", document, re.DOTALL)
    assert re.search(r"^#SBATCH --array=1-8$", script, re.MULTILINE)
    for name, text in {
        "quantgate": 'echo "$*" >> said',
        "sbatch": '[ "$1" = --parsable ] && exec echo 42; echo "$1" >> said; sh -c "${2#--wrap=}"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    variables["SLURM_ARRAY_JOB_ID"] = "42"
    for number in (1, 2):
        (tmp_path / "report" / "42" / f"shard-{number}-of-8").mkdir(parents=True)
    for text in (script, submit):
        subprocess.run(["bash", "-e", "-c", text], cwd=tmp_path, env=variables, check=True)
    gate, dependency, merged = (tmp_path / "said").read_text().splitlines()
    assert gate == "gate --shard slurm --report report/42"
    assert dependency == "--dependency=afterany:42"
    given = parse(shlex.split(merged))
    assert list(map(str, given.directories)) == [f"report/42/shard-{n}-of-8" for n in (1, 2)]
    assert (str(given.report), parse(shlex.split(gate)).shard) == ("report/42", "slurm")


def test_the_workflow_of_the_document(document: str) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", document, re.DOTALL)
    jobs = yaml.safe_load(text)["jobs"]
    shards = jobs["shard"]["strategy"]["matrix"]["shard"]
    assert jobs["shard"]["env"]["SHARD"] == "${{ matrix.shard }}/3"
    assert [Shard(number, 3, IDS).name for number in shards] == ["1/3", "2/3", "3/3"]
    assert (jobs["gate"]["needs"], jobs["gate"]["if"]) == ("shard", "always()")
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("quantgate ")]
    gate, merged = map(parse, commands)
    assert (gate.shard, str(gate.report), str(merged.report)) == ("$SHARD", "report", "report")
    assert list(map(str, merged.directories)) == ["report/shard-*"]

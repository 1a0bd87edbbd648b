"""Workers share GPUs and engines; each engine starts once."""

import json
from pathlib import Path
from typing import Any

import pytest
from harness import RunGate, project_of

pytestmark = pytest.mark.long


@pytest.fixture
def two_checkpoints(project: Path, root: Path) -> Path:
    """A project of two checkpoints with one base, which writes down what its workers do."""
    return project_of(project, root, "tiny-llama-w8a16", "tiny-llama-mxfp8")


def checks_of(project: Path, report: str) -> dict[tuple[str, str], dict[str, Any]]:
    found = json.loads((project / report / "gate.json").read_text())
    return {(one["id"], check["name"]): check
            for one in found["checkpoints"] for check in one["checks"]}  # fmt: skip


def test_two_workers_start_each_engine_once_and_say_what_one_process_says(
    two_checkpoints: Path,
) -> None:
    """Both workers need the base, on GPUs of their own from a made-up list of four.

    Each process computes with one thread: sums of another number of them may round otherwise.
    """
    project, run_gate = two_checkpoints, RunGate(two_checkpoints)
    arguments = ["suites", "-k", "drift or quality or seen", "-p", "no:cacheprovider"]
    log = project / "starts.jsonl"
    starts, checks, output = {}, {}, {}
    for name, more in (("serial", []), ("parallel", ["-n", "2", "--dist", "loadgroup"])):
        done = run_gate(
            *arguments, *more, "--gate-report", name, "--gate-cache", f"cache-{name}",
            CUDA_VISIBLE_DEVICES="0,1,2,3", OMP_NUM_THREADS="1",
        )  # fmt: skip
        starts[name] = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        checks[name], output[name] = checks_of(project, name), done.stdout
    seen = {path.name.partition("-")[2]: (path.name[:3], path.read_text())
            for path in project.glob("gw*.txt")}  # fmt: skip
    assert sorted(seen.values()) == [("gw0", "0,1"), ("gw1", "2,3")], output["parallel"]

    engines = {name: sorted(what for _, *what in found) for name, found in starts.items()}
    assert len(engines["serial"]) == 5  # two of each checkpoint, one of their base
    assert engines["parallel"] == engines["serial"]
    assert len({str(what) for what in engines["serial"]}) == 5
    by_worker = {(worker, directory) for worker, directory, _ in starts["parallel"]}
    assert {worker for worker, _ in by_worker} == {"gw0", "gw1"}
    assert len(by_worker) == 3

    assert list(checks["parallel"]) == list(checks["serial"])
    for key, check in checks["serial"].items():
        if key[1] != "seen":
            assert check["verdict"] == "pass"
            assert checks["parallel"][key] == check
    for text in output.values():
        assert "on cuda and 7 more: it needs a GPU and this machine has none" in text


def test_an_engine_of_unknown_size_does_not_share_a_gpu(two_checkpoints: Path) -> None:
    """Both embedded files give the size of their KV cache; without one of them, nothing starts."""
    run_gate = RunGate(two_checkpoints)
    arguments = ["suites", "-k", "seen", "-p", "no:cacheprovider", "-n", "2"]
    arguments += ["--dist", "loadgroup"]
    shared = run_gate(*arguments, CUDA_VISIBLE_DEVICES="5")
    assert "2 passed" in shared.stdout
    assert {path.read_text() for path in two_checkpoints.glob("gw*.txt")} == {"5"}
    file = two_checkpoints / "fixtures" / "checkpoints" / "tiny-llama-mxfp8.toml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "kv_cache_memory" not in line))
    refused = run_gate(*arguments, CUDA_VISIBLE_DEVICES="5")
    assert refused.returncode == 4
    said = "tiny-llama-mxfp8: with -n 2 on 1 GPU(s) engines share one"
    assert said in refused.stdout + refused.stderr


@pytest.mark.parametrize("name", ["tiny-colbert-bert-w8a8", "tiny-llama-embed-w4a16"])
def test_no_check_starts_an_engine_that_another_one_started(
    project: Path, root: Path, name: str
) -> None:
    """Of a model that reads both ways, whose prompts stay whole, and of one that is chunked.

    Each is one engine in each dtype: what is served again in chunks is served by it as well.
    """
    run_gate = RunGate(project_of(project, root, name))
    done = run_gate("suites", "-k", "not seen", "--gate-report", "report")
    assert done.returncode == 0, done.stdout
    starts = (project / "starts.jsonl").read_text().splitlines()
    assert len(starts) == len(set(starts))
    checkpoint = [line for line in starts if "/build/" in line]
    assert len(checkpoint) == 2
    report = json.loads((project / "report" / "gate.json").read_text())
    assert len(report["engines"]) == len(starts)
    assert f"engines: {len(starts)} started, " in done.stdout

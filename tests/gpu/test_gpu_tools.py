"""`make gpu`: on the CPU, to show that it measures, writes, and survives what it measures."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
from harness import running, wait_until
from hypothesis import given
from hypothesis import strategies as st

from gpu.journal import Journal
from gpu.tables import markdown

pytestmark = pytest.mark.long

TOOL = "tools/measure_gpu.py"
WITHOUT = ("--without-a-gpu",)
NAME = "tiny-llama-w8a8"


def gpu(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        cwd=root, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip


@pytest.fixture
def tooled(project: Path, root: Path) -> Path:
    """A project with the tools and the checkpoint that they are tried on, and smaller probes."""
    shutil.copytree(root / "tools", project / "tools")
    file = Path("fixtures") / "checkpoints" / f"{NAME}.toml"
    shutil.copy(root / file, project / file)
    return project


def test_without_a_gpu_it_says_so(root: Path, tmp_path: Path) -> None:
    done = gpu(root, "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: no GPU here: torch sees none, so no kernel of one can be measured; "
        "--without-a-gpu tries the command on the CPU.\n"
    )
    assert not list(tmp_path.iterdir())
    listed = gpu(root, "--list")
    assert listed.returncode == 0
    for part in ("machine", "formats", "ways", "batch-invariant", "runner-v1", "runner-v2", "gate"):
        assert f"\n{part}: " in f"\n{listed.stdout}"
    assert "8b W4A16\n" in listed.stdout
    assert "0.5b 1024\n" in listed.stdout
    unknown = gpu(root, *WITHOUT, "--checkpoint", "nobody")
    assert unknown.returncode == 2
    assert "--checkpoint nobody: not an id in fixtures/checkpoints" in unknown.stderr
    none = gpu(root, *WITHOUT, "--only", "nothing is called this")
    assert none.returncode == 2
    assert "nothing is selected" in none.stderr


@pytest.mark.slow(reason="every part of make gpu, with an engine that vLLM compiles")
def test_it_measures_once_and_writes_figures_and_tables(tooled: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures"
    parts = ["machine", "formats", "ways", "runner-v1", "runner-v2", "reference", "forced"]
    arguments: list[str | Path] = [*WITHOUT, "--checkpoint", NAME, "--out", out]
    arguments += [word for part in parts for word in ("--part", part)]
    done = gpu(tooled, *arguments)
    content = json.loads((out / "gpu.json").read_text())
    assert done.returncode == 1, done.stderr  # V2 needs Triton
    (missed,) = content["parts"]["runner-v2"]
    assert "Model Runner V2 requires Triton" in missed["not_run"]
    assert f"not run: runner-v2, {NAME} serving: " in done.stdout
    assert content["versions"]["vllm"]
    assert content["device"]

    (machine,) = content["parts"]["machine"]
    assert [one["scheme"] for one in machine["figures"]["formats"]] == ["W8A8"]
    formats = {said["item"]: said["figures"] for said in content["parts"]["formats"]}
    assert set(formats) == {f"{NAME} bfloat16", f"{NAME} float16"}
    for figures in formats.values():
        assert figures["replay"]["verdict"] == figures["fidelity"]["verdict"] == "pass"
        assert 0 < figures["replay"]["median"] <= figures["replay"]["largest"]
        assert figures["replay"]["largest"] == pytest.approx(figures["replay"]["measured"])
    # A mantissa of 10 bits rounds eight times finer than one of 7.
    coarse, fine = (formats[f"{NAME} {d}"]["replay"]["median"] for d in ("bfloat16", "float16"))
    assert 4 < coarse / fine < 16
    (ways,) = (said["figures"] for said in content["parts"]["ways"])
    assert ways["invariance"]["verdict"] == ways["compiled"]["verdict"] == "pass"
    assert ways["noise"]
    for said in content["parts"]["reference"]:  # twice on the CPU
        assert said["figures"]["device"] == "cpu"
        assert said["figures"]["largest"] == said["figures"]["mean"] == 0
        assert min(said["figures"]["seconds"].values()) > 0
    (forced,) = (said["figures"] for said in content["parts"]["forced"])
    assert forced["disabled"] == "CPUInt8ScaledMMLinearKernel"
    tables = (out / "gpu.md").read_text()
    for heading in ("machine", "formats", "ways", "runner-v1", "reference", "forced", "Not run"):
        assert f"\n### {heading}\n" in tables

    # What was measured is not measured again; what was not run is tried again.
    before = {p: p.stat().st_mtime_ns for p in out.glob("measured/*/formats/*.json")}
    again = gpu(tooled, *WITHOUT, "--checkpoint", NAME, "--out", out,
                "--part", "formats", "--part", "runner-v2")  # fmt: skip
    assert again.returncode == 1
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert "runner-v2: " in again.stderr
    kept = json.loads((out / "gpu.json").read_text())["parts"]
    assert kept["ways"] == content["parts"]["ways"]


def test_one_engine_is_benchmarked_with_several_amounts_of_work(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, "tools/bench_score.py", "--shape", "smallest", "--skip", "hf",
         "--skip", "lm-eval", "--rounds", "1", "--json", str(path),
         "--prompts", "8", "2", "--tokens", "15", "100"],
        cwd=root, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    assert [(one["prompts"], one["tokens"]) for one in figures["work"]] == [(8, 15), (2, 100)]
    for one in figures["work"]:
        assert {"prefill", "score", "stock dicts", "stock flat"} <= one["modes"].keys()
        assert one["costs"]["of_floor"] > 0
    content = {"date": "2026-01-01", "device": "a GPU", "versions": {}, "command": [],
               "parts": {"speed": [{"item": "smallest none", "figures": figures}]}}  # fmt: skip
    table = markdown(content)
    for amount in ("8 × 15", "2 × 100"):
        assert f"| smallest | none | {amount} | score | " in table
    odd = subprocess.run(
        [sys.executable, "tools/bench_score.py", "--prompts", "8", "2"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert odd.returncode == 2
    assert "--prompts and --tokens need as many numbers" in odd.stderr


def test_figures_so_far_are_written_when_it_is_ended(tooled: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "figures", tmp_path / "log"
    command = [sys.executable, TOOL, *WITHOUT, "--checkpoint", NAME, "--out", str(out)]
    command += ["--part", "machine", "--part", "ways"]
    measured = out / "measured"
    with running(command, log, cwd=tooled) as process:
        wait_until(lambda: list(measured.glob("*/ways/running-*")), process, log, 300)
    assert process.returncode == 128 + 15
    parts = json.loads((out / "gpu.json").read_text())["parts"]
    assert "figures" in parts["machine"][0]
    assert parts["ways"] == []


WORKER = """
import os, pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from gpu.journal import Journal
journal = Journal(pathlib.Path(sys.argv[2]))
for item in journal.waiting(["fine", "killed", "hangs", "also fine"]):
    journal.start(item)
    if item == "killed":
        os.kill(os.getpid(), 9)
    if item == "hangs":
        time.sleep(600)
    journal.write(item, figures={"by": os.environ["WHO"]})
"""


def why_not(journal: Journal, item: str) -> str:
    said = journal.read(item)
    assert said is not None
    return str(said["not_run"])


def test_what_kills_or_hangs_a_worker_is_not_run_and_the_rest_is(
    root: Path, tmp_path: Path
) -> None:
    from gpu import workers

    journal = Journal(tmp_path)
    items = ["fine", "killed", "hangs", "also fine"]
    command = [sys.executable, "-c", WORKER, str(root / "tools"), str(tmp_path)]
    workers.supervise(command, journal, items, workers.Limits(2.0), {"WHO": "a worker"})
    for item in ("fine", "also fine"):
        assert journal.read(item) == {"item": item, "figures": {"by": "a worker"}}
    assert why_not(journal, "killed") == "its process ended with status -9 on the way"
    assert why_not(journal, "hangs") == "it took longer than 2 s"


SHARES = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from dataclasses import replace
from gpu.journal import Journal
from gpu.workers import share_of
number = int(sys.argv[3].split("/")[0])
journal = Journal(pathlib.Path(sys.argv[2]), worker=number)
for item in journal.waiting(share_of("abcdefg", sys.argv[3])):
    journal.start(item)
    if item == "b":
        sys.exit(5)
    while item == "d" and journal.waiting("f"):  # another process does it
        time.sleep(0.05)
    journal.write(item, figures={"by": number})
"""


def test_processes_side_by_side_share_the_items(root: Path, tmp_path: Path) -> None:
    from gpu import workers

    journal = Journal(tmp_path)
    command = [sys.executable, "-c", SHARES, str(root / "tools"), str(tmp_path)]
    workers.supervise(command, journal, "abcdefg", workers.Limits(20), {}, processes=3)
    by = {item: said["figures"]["by"] for item in "acdefg" if (said := journal.read(item))}
    assert by == {"a": 0, "d": 0, "g": 0, "e": 1, "c": 2, "f": 2}
    assert why_not(journal, "b") == "its process ended with status 5 on the way"


def test_what_the_minutes_do_not_reach_is_not_run(root: Path, tmp_path: Path) -> None:
    """The item in progress ends, and the rest does not begin."""
    from gpu import workers

    journal = Journal(tmp_path)
    command = [sys.executable, "-c", WORKER, str(root / "tools"), str(tmp_path)]
    limits = workers.Limits(600, deadline=time.time() + 4)
    workers.supervise(command, journal, ["fine", "hangs", "also fine"], limits, {"WHO": "one"})
    assert journal.read("fine") == {"item": "fine", "figures": {"by": "one"}}
    for item in ("hangs", "also fine"):
        assert why_not(journal, item) == workers.OVER


def test_a_worker_that_does_not_begin_is_no_endless_loop(tmp_path: Path) -> None:
    from gpu import workers

    journal = Journal(tmp_path)
    ends = [sys.executable, "-c", "raise SystemExit(3)"]
    workers.supervise(ends, journal, ["a", "b"], workers.Limits(60), {})
    for item in ("a", "b"):
        said = "its process did not begin: its process ended with status 3 on the way"
        assert why_not(journal, item) == said


def test_a_lost_device_costs_one_process_and_the_item_that_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import workers
    from gpu.parts import PARTS, Part
    from quantgate.measuring.engine_failure import EngineFailure, LostDevice

    asked = []

    def measure(item: str, *_: Any) -> dict[str, Any]:
        asked.append(item)
        if item == "b":
            raise EngineFailure("CUDA error")
        if item == "c":
            raise LostDevice("not served, because the GPU was lost")
        return {"is": item}

    part = Part("?", lambda _: ["a", "b", "c"], measure, 1)
    monkeypatch.setitem(PARTS, "machine", part)
    journal = Journal(tmp_path)
    workers.work("machine", journal, ["a", "b", "c"], {}, tmp_path)
    assert asked == ["a", "b", "c"]
    assert why_not(journal, "b") == "CUDA error"
    assert journal.waiting(["a", "b", "c"]) == ["c"]
    assert journal.started() is None  # so that nobody takes it for the one that was lost


def test_the_heads_figures_are_a_table() -> None:
    """As tools/bench_head.py writes them, with a candidate that the device did not take."""
    floor = {"milliseconds": 10.7, "of_floor": 1.0, "error": None, "batch": None, "failed": None}
    ours = {**floor, "milliseconds": 12.0, "of_floor": 1.12, "error": 4e-6, "batch": 0.0}
    large = dict.fromkeys(floor) | {"failed": "OutOfResources: shared memory"}
    candidates = {"cuBLAS bfloat16": floor, "score mode": ours, "fused, large": large}
    figures = {"measured": [{"shape": "8b", "rows": 64, "candidates": candidates}]}
    said = {"item": "8b 64", "figures": figures}
    content = {"date": "2026-01-01", "device": "a GPU", "versions": {}, "command": [],
               "parts": {"head": [said]}}  # fmt: skip
    table = markdown(content)
    assert "| 8b | 64 | cuBLAS bfloat16 | 10.700 | 1.00 |  |  |" in table
    assert "| 8b | 64 | score mode | 12.000 | 1.12 | 4.0e-06 | 0.0e+00 |" in table
    assert "| 8b | 64 | fused, large | not run: OutOfResources: shared memory |  |  |  |" in table


@given(
    hidden=st.sampled_from([64, 256, 896, 4096]),
    layers=st.integers(1, 40),
    prompts=st.integers(1, 64),
    tokens=st.integers(1, 2048),
    scheme=st.sampled_from(["none", "W4A16", "FP8_DYNAMIC"]),
)
def test_the_floor_counts_what_a_forward_pass_multiplies(
    hidden: int, layers: int, prompts: int, tokens: int, scheme: str
) -> None:
    """Linears and head as their shapes say, a token at a time."""
    import argparse

    from gpu import floors

    shape = argparse.Namespace(
        hidden=hidden, layers=layers, heads=hidden // 64, kv_heads=1, intermediate=4 * hidden,
        vocab=1000, prompts=prompts, tokens=tokens, scheme=scheme, dtype="bfloat16",
    )  # fmt: skip
    q, kv = shape.heads * 64, 64
    linears = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden),
               (hidden, 4 * hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]  # fmt: skip
    products = sum(2 * a * b for a, b in linears) * layers * prompts * tokens
    attention = layers * prompts * tokens * 2 * tokens * q
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(floors, "matrix_rate", lambda dtype: 1.0)
        found = floors.floors(shape)
    assert found["prefill"] == pytest.approx(products + attention)
    assert found["score"] == pytest.approx(found["prefill"] + 2 * hidden * 1000 * prompts * tokens)


@pytest.mark.slow(reason="builds a wheel, and an environment without an index")
def test_an_offline_machine_runs_what_was_packed_for_it(root: Path, tmp_path: Path) -> None:
    """A machine with this one's packages but quantgate, wrapt and syrupy, and without a network."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    )
    absent = ("quantgate", "wrapt", "syrupy")
    kept = [line for line in listed.stdout.splitlines() if not line.startswith((*absent, "-e"))]
    have = tmp_path / "have.txt"
    have.write_text("\n".join(kept))
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    packed = tmp_path / "packed"
    done = subprocess.run(
        [sys.executable, "tools/offline.py", "--python", python, "--have", str(have),
         "--extra", "cpu", "--out", str(packed)],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wheels = {path.name.split("-")[0] for path in (packed / "wheels").iterdir()}
    assert wheels == set(absent)

    machine = tmp_path / "site-packages"
    machine.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith((*absent, "_quantgate", "__editable__")):
            (machine / entry.name).symlink_to(entry)
    environment = {**os.environ, "PYTHONPATH": str(machine), "PIP_NO_INDEX": "1",
                   "PYTHON": str(Path(sys.base_prefix) / "bin" / f"python{python}")}  # fmt: skip
    (packed / "source").mkdir()
    (packed / "source" / "build").symlink_to(root / "build")  # it takes minutes to build
    ran = subprocess.run(
        ["bash", str(packed / "run.sh"), *WITHOUT, "--out", str(tmp_path / "figures"),
         "--part", "machine", "--checkpoint", NAME],
        env=environment, capture_output=True, text=True, check=False, timeout=580,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content = json.loads((tmp_path / "figures" / "gpu.json").read_text())
    assert "figures" in content["parts"]["machine"][0]

    run = packed / "run.sh"
    run.write_text(run.read_text().replace(f"!= {python} ]", "!= 3.99 ]"))
    wrong = subprocess.run(
        ["bash", str(run)], env=environment, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert f"is Python {python}, and this was packed for" in wrong.stderr


@pytest.mark.parametrize("content", [None, "-e git+x\n"])
def test_bad_lists_of_what_a_machine_has_are_one_sentence(
    root: Path, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "have.txt"
    if content is not None:
        path.write_text(content)
    done = subprocess.run(
        [sys.executable, "tools/offline.py", "--have", str(path), "--out", str(tmp_path / "x")],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --have {path}: ")
    assert not (tmp_path / "x").exists()

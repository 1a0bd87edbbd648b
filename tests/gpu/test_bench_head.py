"""tools/bench_head.py: that it measures and writes, in Triton's interpreter; no speed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = "tools/bench_head.py"


def bench(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        cwd=root, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(root: Path) -> None:
    done = bench(root)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: no GPU here: torch sees none, and the kernels' speed is that of one; "
        "--device cpu tries the command in Triton's interpreter.\n"
    )


def test_no_rows_are_refused(root: Path) -> None:
    done = bench(root, "--device", "cpu", "--rows", "0")
    assert done.returncode == 2
    assert "--rows and --rounds are at least 1" in done.stderr


def test_it_measures_and_writes(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "head.json"
    arguments = ["--device", "cpu", "--shape", "smallest", "--rows", "2", "--rounds", "1"]
    done = bench(root, *arguments, "--json", path)
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert content["interpreted"]
    assert content["versions"]["torch"]
    (measured,) = content["measured"]
    assert (measured["shape"], measured["rows"]) == ("smallest", 2)
    floor, score_mode = (measured["candidates"][n] for n in ("cuBLAS bfloat16", "score mode"))
    assert floor["of_floor"] == 1.0
    assert floor["error"] is None
    assert score_mode["error"] < 1e-5
    assert score_mode["batch"] < 1e-6
    assert score_mode["of_floor"] > 0
    assert "smallest, 2 rows" in done.stdout
    assert all(one["failed"] is None for one in measured["candidates"].values())

"""GPUs and workers: each worker owns its own; a checkpoint stays on one; reports are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.checkpoint import BadInput
from quantgate.devices import gpus, require_gpus, share
from quantgate.scheduling import group_of


@given(count=st.integers(0, 16), workers=st.integers(1, 16))
def test_no_gpu_is_shared_and_parts_are_equal(count: int, workers: int) -> None:
    found = [f"GPU-{i}" for i in range(count)]
    if 0 < count < workers:
        with pytest.raises(BadInput, match=f"give -n {count} at most"):
            share(0, workers, found)
        return
    parts = [share(worker, workers, found) for worker in range(workers)]
    assert {len(part) for part in parts} == {count // workers}
    owned = [name for part in parts for name in part]
    assert len(owned) == len(set(owned))


def test_a_checkpoint_that_needs_more_than_a_worker_has_is_refused() -> None:
    require_gpus("x", 2, 2, 4)
    with pytest.raises(BadInput, match="x: tensor_parallel_size=4, but with -n 4 a worker owns 2"):
        require_gpus("x", 4, 2, 4)


def test_what_is_visible_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert gpus() == ["3", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("suites/test_perplexity.py::test_drift[tiny-llama-w4a16-cpu-float32]", "tiny-llama-w4a16"),
        (
            "suites/test_perplexity.py::test_quality[llama-3.2-cpu-tuned-cuda]",
            "llama-3.2-cpu-tuned",
        ),
        ("suites/test_invariance.py::test_invariance[x-cuda-serving]", "x"),
        ("tests/test_stats.py::test_it[0.5]", "tests/test_stats.py::test_it[0.5]"),
        ("tests/test_stats.py::test_it", "tests/test_stats.py::test_it"),
    ],
)
def test_a_checkpoint_is_one_group(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group


def test_two_workers_own_their_gpus_and_judge_a_checkpoint_each(project: Path, root: Path) -> None:
    """On a made-up list of four: what workers see is written down by a test beside the suites."""
    for name in ("tiny-llama-w8a16", "tiny-llama-mxfp8"):
        path = project / "fixtures" / "checkpoints" / f"{name}.toml"
        path.write_text((root / "fixtures" / "checkpoints" / f"{name}.toml").read_text()
                        + "")  # fmt: skip
        (project / "golden" / name).symlink_to(root / "golden" / name)
    (project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml").unlink()
    (project / "golden" / "tiny-llama-w4a16").rename(project / "elsewhere")
    (project / "suites" / "test_seen.py").write_text(
        "import os, pathlib\n"
        "def test_seen(checkpoint, device, worker_id):\n"
        "    name = f'{worker_id}-{checkpoint.id}.txt'\n"
        "    pathlib.Path(name).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', ''))\n"
    )
    command = [sys.executable, "-m", "pytest", "suites", "-k", "drift or seen", "-p",
               "no:cacheprovider", "--gate-report"]  # fmt: skip
    serial = subprocess.run([*command, "serial"], cwd=project, capture_output=True, text=True)
    parallel = subprocess.run(
        [*command, "parallel", "-n", "2", "--dist", "loadgroup"],
        cwd=project, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0,1,2,3"},
    )  # fmt: skip
    seen = {path.name.partition("-")[2]: (path.name[:3], path.read_text())
            for path in project.glob("gw*.txt")}  # fmt: skip
    assert sorted(seen.values()) == [("gw0", "0,1"), ("gw1", "2,3")], parallel.stdout
    reports = [json.loads((project / name / "gate.json").read_text())
               for name in ("serial", "parallel")]  # fmt: skip
    checks = [
        {(c["id"], check["name"]): (check["verdict"], check["measured"])
         for c in report["checkpoints"] for check in c["checks"] if check["name"] != "seen"}
        for report in reports
    ]  # fmt: skip
    assert len(checks[0]) == 4
    assert {verdict for verdict, _ in checks[0].values()} == {"pass"}
    assert [list(found) for found in checks] == [list(checks[0])] * 2
    assert {verdict for verdict, _ in checks[1].values()} == {"pass"}
    for result in (serial, parallel):
        assert "on cuda and 5 more: it needs a GPU and this machine has none" in result.stdout

"""GPUs and workers: each worker owns its own, and a checkpoint stays on one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.plugin.devices import gpus, require_fixed_cache, require_gpus, share
from quantgate.plugin.scheduling import group_of
from quantgate.subject.checkpoint import Checkpoint, EngineSettings


@given(count=st.integers(0, 16), workers=st.integers(1, 16))
def test_parts_are_equal_and_a_gpu_is_shared_only_if_there_are_too_few(
    count: int, workers: int
) -> None:
    found = [f"GPU-{i}" for i in range(count)]
    parts = [share(worker, workers, found) for worker in range(workers)]
    if 0 < count < workers:
        assert {len(part) for part in parts} == {1}
        times = [parts.count([name]) for name in found]
        assert max(times) - min(times) <= 1
        return
    assert {len(part) for part in parts} == {count // workers}
    owned = [name for part in parts for name in part]
    assert len(owned) == len(set(owned))


def test_a_checkpoint_that_needs_more_than_a_worker_has_is_refused() -> None:
    require_gpus("x", 2, 2, 4)
    with pytest.raises(BadInput, match="x: tensor_parallel_size=4, but with -n 4 a worker owns 2"):
        require_gpus("x", 4, 2, 4)


def test_an_engine_that_takes_a_whole_gpu_does_not_share_one() -> None:
    fixed = Checkpoint("x", "./x", engine=EngineSettings(kv_cache_memory_bytes=1 << 27))
    require_fixed_cache(fixed, 12, 1)
    message = r"x: with -n 12 on 1 GPU\(s\) engines share one.* or -n 1 at most"
    with pytest.raises(BadInput, match=message):
        require_fixed_cache(Checkpoint("x", "./x"), 12, 1)


def test_what_is_visible_is_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert gpus() == ["3", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus() == []


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("suites/test_drift.py::test_drift[tiny-llama-w4a16-cpu-float32]", "tiny-llama-w4a16"),
        (
            "suites/test_quality.py::test_quality[llama-3.2-cpu-tuned-cuda]",
            "llama-3.2-cpu-tuned",
        ),
        ("suites/test_invariance.py::test_invariance[x-cuda-serving]", "x"),
        ("tests/test_stats.py::test_it[0.5]", "tests/test_stats.py"),
        ("tests/test_stats.py::test_it", "tests/test_stats.py"),
    ],
)
def test_a_checkpoint_is_one_group(nodeid: str, group: str) -> None:
    assert group_of(nodeid) == group

"""Gate runs whose engine fails: explained, not run, and never a hang."""

from pathlib import Path
from typing import Any

import pytest
from fake_engine import VICTIM
from harness import RunGate, project_of

pytestmark = pytest.mark.long

KILLS = pytest.mark.slow(reason="engines in processes of their own, one of which is killed")
OTHER = "tiny-llama-w8a16"


@pytest.fixture
def run_faulty(project: Path, root: Path) -> RunGate:
    """A project of two checkpoints; serving the first one has the fault that FAULT names."""
    return RunGate(project_of(project, root, VICTIM, OTHER))


def verdicts(run_gate: RunGate) -> dict[str, list[dict[str, Any]]]:
    return {one["id"]: one["checks"] for one in run_gate.report["checkpoints"]}


@pytest.mark.parametrize(
    ("fault", "environment", "settings", "said"),
    [
        pytest.param("take the memory", {}, "", "float32 (RuntimeError: ", id="out of memory"),
        pytest.param(
            "kill a process of vLLM's",
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            "",
            "a process of vLLM's has ended; what it said is in the output, and `dmesg`",
            marks=KILLS,
            id="engine killed",
        ),
        pytest.param(
            "kill a process of vLLM's",
            {},
            "tensor_parallel_size = 2\n",
            "a process of vLLM's has ended; what it said is in the output, and `dmesg`",
            marks=KILLS,
            id="tensor-parallel worker killed",
        ),
    ],
)
def test_what_cannot_be_served_is_not_run_and_the_next_checkpoint_is_judged(
    run_faulty: RunGate, fault: str, environment: dict[str, str], settings: str, said: str
) -> None:
    file = run_faulty.project / "fixtures" / "checkpoints" / f"{VICTIM}.toml"
    file.write_text(file.read_text().replace("[engine]\n", f"[engine]\n{settings}"))
    done = run_faulty(
        "suites", "-k", "fidelity and float32", "--gate-report", "report", "-p", "no:cacheprovider",
        FAULT=fault, **environment,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    (victim,), (other,) = verdicts(run_faulty)[VICTIM], verdicts(run_faulty)[OTHER]
    assert (victim["verdict"], other["verdict"]) == ("not-run", "pass"), done.stdout
    assert f"build/{VICTIM}: vLLM " in victim["detail"]
    assert "failed while it served it in float32" in victim["detail"]
    assert said in victim["detail"]
    if fault == "take the memory":
        assert "out of memory; give it more ranks" in victim["detail"]
    assert victim["detail"] in done.stdout
    assert "Traceback" not in done.stdout.partition("Captured")[0]


def test_what_follows_a_lost_device_is_not_run_and_says_why(run_faulty: RunGate) -> None:
    done = run_faulty(
        "suites", "-k", "fidelity and float32", "--gate-report", "report", FAULT="lose the device"
    )
    assert done.returncode == 1, done.stdout
    (victim,), (other,) = verdicts(run_faulty)[VICTIM], verdicts(run_faulty)[OTHER]
    assert (victim["verdict"], other["verdict"]) == ("not-run", "not-run")
    assert "AcceleratorError: CUDA error: an illegal memory access" in victim["detail"]
    assert "CUDA_LAUNCH_BLOCKING=1 names the kernel" in victim["detail"]
    assert other["detail"].startswith("not served, because the GPU was lost to this process when ")
    assert VICTIM in other["detail"]


@KILLS
def test_a_checkpoint_that_ends_its_worker_is_not_run_and_others_are_judged(
    run_faulty: RunGate,
) -> None:
    """The heir owns what the dead one did, of a made-up list of two GPUs."""
    done = run_faulty(
        "suites", "-k", "(fidelity or replay) and float32", "--gate-report", "report",
        "-n", "2", FAULT="kill an xdist worker", CUDA_VISIBLE_DEVICES="0,1",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    found = {name: {c["name"]: c for c in checks} for name, checks in verdicts(run_faulty).items()}
    dead = (run_faulty.project / "killed").read_text()
    assert {name: {key: check["verdict"] for key, check in checks.items()}
            for name, checks in found.items()} == {
        VICTIM: {"fidelity-float32": "not-run", "replay-float32": "not-run"},
        OTHER: {"fidelity-float32": "pass", "replay-float32": "pass"},
    }, done.stdout  # fmt: skip
    assert f"worker '{dead}' crashed while running" in found[VICTIM]["fidelity-float32"]["detail"]
    said = found[VICTIM]["replay-float32"]["detail"]
    assert said == "its xdist worker crashed while judging fidelity-float32"
    owned = {worker: (run_faulty.project / f"gpus-of-{worker}").read_text()
             for worker in ("gw0", "gw1", "gw2")}  # fmt: skip
    assert owned == {"gw0": "0", "gw1": "1", "gw2": owned[dead]}

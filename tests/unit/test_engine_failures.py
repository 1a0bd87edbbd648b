"""Engines that fail: out of memory, killed, on a broken device. Said, not run, and never a hang."""

from pathlib import Path
from typing import Any

import pytest
from harness import RunGate, project_of
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.measuring import engine_failure
from quantgate.measuring.engine_failure import EngineFailure, LostDevice, explained, require_device
from quantgate.plugin.scheduling import check_of
from quantgate.subject.probe import Probe

KILLS = pytest.mark.slow(reason="engines in processes of their own, one of which is killed")
VICTIM, OTHER = "tiny-llama-w4a16", "tiny-llama-w8a16"
FAULTS = f"""
import multiprocessing, os, pathlib, signal
import quantgate.measuring.engine as engine
from quantgate.measuring import engine_failure

stock = engine.serve

def serve(llm, *arguments):
    fault = os.environ["FAULT"] if "{VICTIM}" in llm.llm_engine.model_config.model else ""
    if fault == "kill a process of vLLM's":
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    if fault == "kill an xdist worker" and not os.path.exists("killed"):
        pathlib.Path("killed").write_text(os.environ["PYTEST_XDIST_WORKER"])
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "lose the device":
        engine_failure._device_answers = lambda: False
        import torch
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\\nmore")
    if fault == "take the memory":
        import torch
        torch.empty(1 << 50)
    return stock(llm, *arguments)

engine.serve = serve

def pytest_sessionstart():
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        pathlib.Path(f"gpus-of-{{worker}}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
"""


@pytest.fixture
def run_faulty(project: Path, root: Path) -> RunGate:
    """A project of two checkpoints; serving the first one has the fault that FAULT names."""
    run_gate = RunGate(project_of(project, root, VICTIM, OTHER))
    with (project / "conftest.py").open("a") as stream:
        stream.write(FAULTS)
    return run_gate


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
    assert said == "its worker ended while it judged fidelity-float32"
    owned = {worker: (run_faulty.project / f"gpus-of-{worker}").read_text()
             for worker in ("gw0", "gw1", "gw2")}  # fmt: skip
    assert owned == {"gw0": "0", "gw1": "1", "gw2": owned[dead]}


@given(
    name=st.from_regex(r"[a-z]+(_[a-z0-9]+)*", fullmatch=True),
    checkpoint=st.from_regex(r"[a-z0-9][a-z0-9.-]*", fullmatch=True),
    device=st.sampled_from(["cpu", "cuda"]),
    dtype=st.sampled_from(["", "float32", "serving"]),
)
def test_a_checks_name_is_read_from_its_id(
    name: str, checkpoint: str, device: str, dtype: str
) -> None:
    parameters = "-".join(filter(None, (checkpoint, device, dtype)))
    found = check_of(f"suites/test_x.py::test_{name}[{parameters}]")
    assert found == "-".join(filter(None, (name.replace("_", "-"), dtype)))
    assert check_of(f"tests/test_x.py::test_{name}") is None
    # A test whose parameter is such an id is none.
    assert check_of(f"tests/test_x.py::test_y[x.py::test_{name}[{parameters}]-z]") is None


def test_mistakes_and_bad_input_keep_their_tracebacks() -> None:
    for error in (TypeError("x"), KeyError("x"), BadInput("x"), EngineFailure("x")):
        with pytest.raises(type(error)), explained("it", but=engine_failure.MISTAKES):
            raise error


@pytest.mark.parametrize(
    "noticed",
    [
        "cancelled",  # the engine's future, in this process
        "the engine's process has ended",  # our own watch of it
        "Executor failed.",  # the engine's watch of its workers
        # Another rank, in the middle of a collective of gloo's, through vLLM's executor.
        "Worker failed with error '[gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:33451. This is typically caused by a remote worker crashing. Check the logs "
        "of the remote worker before reporting an error.', please check the stack trace above",
        "[gloo/transport/tcp/pair.cc:456] writev [127.0.0.1]:3345: Connection reset by peer",
    ],
)
def test_a_process_that_ended_is_named_whoever_notices_it(noticed: str) -> None:
    """Several processes wait for one that is killed; which of them speaks first is a race."""
    with (
        pytest.raises(EngineFailure, match=r"a process of vLLM's has ended; .* `dmesg` says"),
        explained("it"),
    ):
        raise RuntimeError(noticed)


def test_a_device_that_answers_is_not_lost() -> None:
    with pytest.raises(EngineFailure, match="it \\(RuntimeError: CUDA error: x\\): the driver"):
        with explained("it"):
            raise RuntimeError("CUDA error: x")
    require_device()


def test_no_engine_starts_on_a_lost_device(
    monkeypatch: pytest.MonkeyPatch, quantized: Path
) -> None:
    from quantgate.measuring.engine import running_engine
    from quantgate.subject.checkpoint import EngineSettings

    monkeypatch.setattr(engine_failure, "_lost", "not served, because")
    with (
        pytest.raises(LostDevice, match="not served, because"),
        running_engine(quantized, settings=EngineSettings(), dtype="float32"),
    ):
        pass


def test_no_engine_is_alive_when_the_next_one_starts(
    monkeypatch: pytest.MonkeyPatch, quantized: Path, probe: Probe, tmp_path: Path
) -> None:
    """On a GPU the first one's memory would be missing to the second. Plumbing: made-up engines."""
    import gc
    import weakref
    from collections.abc import Iterator
    from contextlib import contextmanager

    from quantgate.measuring import engine
    from quantgate.subject.checkpoint import EngineSettings

    class MadeUp:
        pass

    started: list[weakref.ref[MadeUp]] = []

    @contextmanager
    def running_engine(directory: Path, **_: Any) -> Iterator[MadeUp]:
        gc.collect()
        assert all(reference() is None for reference in started)
        llm = MadeUp()
        started.append(weakref.ref(llm))
        yield llm

    monkeypatch.setattr(engine, "running_engine", running_engine)
    monkeypatch.setattr(engine, "_measured", lambda *_: "measured")
    monkeypatch.setattr(engine, "capture", lambda *_: "captured")
    settings = EngineSettings(enforce_eager=False)
    found: tuple[object, object] = engine.measure(
        quantized, probe, settings=settings, dtype="bfloat16", announce=print, capture_into=tmp_path
    )
    assert found == ("measured", "captured")
    assert len(started) == 2

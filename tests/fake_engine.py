"""A pytest plugin for a test's project: engines that are noted when they start, and that fail.

`install` puts it into a project. Each engine that starts there is a line of starts.jsonl. Serving
`VICTIM` has the fault that the run's FAULT names, one of `FAULTS`; other checkpoints are served as
ever. Each xdist worker writes the GPUs that it was given to gpus-of-<worker>.
"""

import json
import multiprocessing
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quantgate.measuring import engine, engine_failure, session

VICTIM = "tiny-llama-w4a16"
WORKER = "PYTEST_XDIST_WORKER"


def install(project: Path) -> None:
    """Let pytest load this file in a project; its pyproject.toml has tests/ on the path."""
    (project / "tests").mkdir(exist_ok=True)
    shutil.copy(__file__, project / "tests")
    with (project / "conftest.py").open("a") as stream:
        stream.write('\npytest_plugins += ("fake_engine",)\n')


def pytest_configure() -> None:
    engine.running_engine = _noted(engine.running_engine)
    session.serve = _faulty(session.serve)


def pytest_sessionstart() -> None:
    if worker := os.environ.get(WORKER):
        Path(f"gpus-of-{worker}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))


def _noted(stock: Callable[..., AbstractContextManager[Any]]) -> Any:
    def running_engine(directory: Path, **arguments: Any) -> AbstractContextManager[Any]:
        start = [os.environ.get(WORKER, "serial"), str(directory), repr(sorted(arguments.items()))]
        with Path("starts.jsonl").open("a") as stream:
            stream.write(json.dumps(start) + "\n")
        return stock(directory, **arguments)

    return running_engine


def _faulty(stock: Callable[..., Any]) -> Any:
    def serve(llm: Any, *arguments: Any) -> Any:
        if (fault := os.environ.get("FAULT")) and VICTIM in llm.llm_engine.model_config.model:
            FAULTS[fault]()
        return stock(llm, *arguments)

    return serve


def _kill_a_process_of_vllm() -> None:
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def _kill_the_worker_once() -> None:
    if not Path("killed").exists():
        Path("killed").write_text(os.environ[WORKER])
        os.kill(os.getpid(), signal.SIGKILL)


def _lose_the_device() -> None:
    import torch

    engine_failure._device_answers = lambda: False
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")


def _take_the_memory() -> None:
    import torch

    torch.empty(1 << 50)


def _warn_as(module: str) -> Callable[[], None]:
    return lambda: warnings.warn_explicit("a warning", UserWarning, "x.py", 1, module)


FAULTS: dict[str, Callable[[], None]] = {
    "kill a process of vLLM's": _kill_a_process_of_vllm,
    "kill an xdist worker": _kill_the_worker_once,
    "lose the device": _lose_the_device,
    "take the memory": _take_the_memory,
    "warn as a library does": _warn_as("somelibrary"),
    "warn as our own code does": _warn_as(engine.__name__),
}

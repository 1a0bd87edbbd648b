"""Python processes that have vLLM imported already.

That import costs a processor 15 s, more than most of what a test looks at. A server that has done
it once forks for each run, and from there on everything happens as in a new process: the server has
imported nothing of this project, and no library has started a thread in it.

Run as a script, this file is that server.
"""

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

MODULES = (
    "pytest",
    "rich.table",
    "scipy.stats",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.llama",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
)
# What nothing reads while it is imported, so that a run may have another value than the server.
READ_LATER = ("CI", "FAULT", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_WORKER", "VLLM_CPU_KVCACHE_SPACE")
LONGEST = 1500  # seconds; what takes longer hangs


def run_python(
    *arguments: str | Path,
    cwd: Path,
    env: Mapping[str, str] = os.environ,
    timeout: float = LONGEST,
) -> subprocess.CompletedProcess[str]:
    """Run Python as `subprocess.run([sys.executable, *arguments], …)` does, and capture its text.

    `arguments` begin with a script, with `-m` and a module, or with `-c` and statements. A run
    whose environment is not this process's own is a new process: libraries read variables while
    they are imported.
    """
    words = list(map(str, arguments))
    if _settled(env) == _settled(os.environ):
        return _server().run(words, cwd, env, timeout)
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=dict(env), capture_output=True, text=True,
        check=False, timeout=timeout,
    )  # fmt: skip


def _settled(environment: Mapping[str, str]) -> dict[str, str]:
    from quantgate.measuring.engine import ENVIRONMENT

    found = {**ENVIRONMENT, **environment}
    return {name: value for name, value in found.items() if name not in READ_LATER}


@functools.cache
def _server() -> "_Server":
    return _Server()


class _Server:
    """A process that has imported `MODULES`, and forks for each run."""

    def __init__(self) -> None:
        from quantgate.measuring.engine import ENVIRONMENT

        self.process = subprocess.Popen(
            [sys.executable, __file__], env={**ENVIRONMENT, **os.environ}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self.process.kill)

    def run(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as directory:
            said = [Path(directory) / name for name in ("stdout", "stderr")]
            asked = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env),
                     "said": list(map(str, said))}  # fmt: skip
            pid = self._ask(json.dumps(asked))
            assert self.process.stdout is not None
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                os.kill(pid, signal.SIGKILL)
                self._answer()
                raise subprocess.TimeoutExpired(list(arguments), timeout)
            status = self._answer()
            texts = [path.read_text(errors="replace") for path in said]
        return subprocess.CompletedProcess([sys.executable, *arguments], status, *texts)

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


def _serve() -> dict[str, Any] | None:
    """Fork for each line that comes in; return what to run in a child, None at the end.

    Says the child's process id, and when it has ended its exit status.
    """
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            asked: dict[str, Any] = json.loads(line)
            return asked
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def _become(asked: Mapping[str, Any]) -> None:
    """Make this process what a new one would be at its start."""
    for number, path in ((0, os.devnull), (1, asked["said"][0]), (2, asked["said"][1])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    first, *others = asked["arguments"]
    sys.argv = {"-m": others, "-c": ["-c", *others[1:]]}.get(first, asked["arguments"])
    sys.path[0] = asked["cwd"] if first in ("-m", "-c") else str(Path(first).resolve().parent)


def _run(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(arguments[1], "<string>", "exec"), vars(module))
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _import_all() -> None:
    for name in MODULES:
        importlib.import_module(name)
    # pytest would rewrite the assertions of its plugins, and warns of those that are there already.
    plugins = {point.module.partition(".")[0] for point in entry_points(group="pytest11")}
    for name, module in sys.modules.items():
        if name.partition(".")[0] in plugins:
            module.__doc__ = f"{module.__doc__ or ''} PYTEST_DONT_REWRITE"


if __name__ == "__main__":
    _import_all()
    assert threading.active_count() == 1
    assert not [name for name in sys.modules if name.partition(".")[0] == "quantgate"]
    if (asked := _serve()) is not None:
        _become(asked)
        _run(asked["arguments"])

"""Run the gate, and vLLM's server, as a user would, from a test."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fake_engine import install
from preloaded import run_python
from smaller import shrink_goldens, smaller

from quantgate.measuring.engine import ENVIRONMENT
from quantgate.subject.probe import embedded_probe
from quantgate.subject.task import GENERATE

# What a test's engine runs in, in a process of its own. vLLM's default is most of the memory.
ENGINE_ENVIRONMENT = {**os.environ, **ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": "1"}


REAL = Path("build") / "real"
LLMCOMPRESSOR = Path("build") / "llmcompressor"


def lacking(root: Path) -> dict[str, str]:
    """Return what tests are skipped for want of, and how to have it."""
    needs = {
        "chromium": (shutil.which("chromium"), "apt-get install chromium"),
        "Ray (slow tests only)": (find_spec("ray"), "pip install -e '.[ray]'"),
        "lm-evaluation-harness": (find_spec("lm_eval"), "make env, or pip install -e '.[lm-eval]'"),
        "checkpoints by llm-compressor": (
            (root / LLMCOMPRESSOR).is_dir(),
            "python3 tools/make_llmcompressor.py (an environment of its own, and minutes)",
        ),
        "checkpoints of a real model": (
            (root / REAL / "smollm2-w4a16").is_dir(),
            "python tools/make_real.py (a minute, and 180 MB to fetch)",
        ),
        "figures of a gate run to hold the README against": (
            (root / "report" / "gate.json").is_file(),
            "make gate",
        ),
    }
    return {name: how for name, (there, how) in needs.items() if not there}


def persons_environment() -> dict[str, str]:
    """Return the environment of a person who approves goldens: neither CI nor an xdist worker."""
    ours = ("CI", "PYTEST_XDIST_WORKER")
    return {name: value for name, value in os.environ.items() if name not in ours}


@dataclass(frozen=True)
class RunGate:
    """Runs pytest in `project` as a user would."""

    project: Path

    def __call__(
        self, *arguments: str | Path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return run_python(
            "-m", "pytest", *arguments, cwd=self.project, env={**os.environ, **environment}
        )

    def remove_its_checkpoint(self) -> None:
        """Leave the project without its checkpoint's file and goldens: other files follow."""
        (self.project / "fixtures" / "checkpoints" / "tiny-llama-w4a16.toml").unlink()
        shutil.rmtree(self.project / "golden")

    @property
    def report(self) -> dict[str, Any]:
        """The gate.json of the last run that was given `--gate-report report`."""
        found: dict[str, Any] = json.loads((self.project / "report" / "gate.json").read_text())
        return found


# What is spread over machines: checkpoints of several formats and tasks.
FIVE = (
    "tiny-llama-fp8",
    "tiny-llama-w4a16",
    "tiny-llama-w8a8",
    "tiny-ner-bert-w8a8",
    "tiny-qwen3-w8a8",
)
EIGHT = (*FIVE, "tiny-llama-fp8-kv", "tiny-llama-nvfp4a16", "tiny-reward-qwen2-w4a16")
TIMES = frozenset({"started", "duration_s", "start_s", "served_s"})


def but_for_times(value: Any) -> Any:
    """Return a gate.json without its times: when it began, and what it and its engines took."""
    if isinstance(value, dict):
        return {name: but_for_times(one) for name, one in value.items() if name not in TIMES}
    return list(map(but_for_times, value)) if isinstance(value, list) else value


SEEN = """
import os, pathlib

def test_seen(checkpoint, device, worker_id):
    name = f"{worker_id}-{checkpoint.id}.txt"
    pathlib.Path(name).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
"""


def project_of(project: Path, root: Path, *names: str) -> Path:
    """Make a project one of these checkpoints, which writes down what its workers do.

    What `fake_engine` says of engines and workers, and each worker's GPUs in
    <worker>-<checkpoint>.txt, by a test called "seen".
    """
    RunGate(project).remove_its_checkpoint()
    for name in names:
        file = f"fixtures/checkpoints/{name}.toml"
        shutil.copy(root / file, project / file)
        shutil.copytree(root / "golden" / name, project / "golden" / name)
    whole = embedded_probe(root, GENERATE)
    shrink_goldens(project / "golden", whole, smaller(whole))
    install(project)
    (project / "suites" / "test_seen.py").write_text(SEEN)
    return project


# What takes milliseconds where much is installed, or waits for a disk.
_DEAR_MODULES = ("importlib.metadata", "importlib_metadata", "inspect")
_DEAR_FUNCTIONS = frozenset({"open", "stat", "lstat", "scandir", "listdir", "readlink"})


def dear_calls(run: Callable[[], object]) -> Counter[str]:
    """Count the calls of `run` that a request must not make, by what is called."""
    found: Counter[str] = Counter()

    def seen(frame: Any, event: str, argument: Any) -> None:
        caller = frame.f_globals.get("__name__", "")
        if event == "call" and caller.startswith(_DEAR_MODULES):
            found[f"{caller}.{frame.f_code.co_name}"] += 1
        elif event == "c_call" and argument.__name__ in _DEAR_FUNCTIONS:
            found[f"{argument.__name__} by {caller}"] += 1

    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@contextmanager
def dear_runner_property() -> Iterator[None]:
    """Let what tells the model runner search all that is installed, as on CUDA."""
    from importlib.metadata import entry_points

    from vllm.config import VllmConfig

    stock = VllmConfig.use_v2_model_runner

    def answer(config: Any) -> bool:
        entry_points(group="vllm.general_plugins")
        return bool(stock.fget(config))

    VllmConfig.use_v2_model_runner = property(answer)
    try:
        yield
    finally:
        VllmConfig.use_v2_model_runner = stock


@contextmanager
def running(command: Sequence[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command that writes to `log`, and ask it to end; `options` are `Popen`'s."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_until(
    ready: Callable[[], object], process: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    """Wait for what a process does; fail with its last words where that ends, or takes longer."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


# What a model of random weights is made of, whatever its architecture.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "vocab_size": 1000,  # vLLM pads it to 1,024
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_model(directory: Path, config_class: str, spread: float = 1.0, **settings: Any) -> Any:
    """Save a model of random weights, and return it in float32.

    Its logits are `spread` times as far apart as they would be.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # PhiConfig's biases start at 0
            parameter += 0.1 * torch.randn_like(parameter)
        model.get_output_embeddings().weight *= spread
    model.save_pretrained(directory)
    return model.eval()


STARTING_SECONDS = 180


@contextmanager
def running_server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve a model in float32 on a free port of this machine; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--dtype=float32", "--host=127.0.0.1", f"--port={port}", "--enforce-eager"]
    address = f"http://127.0.0.1:{port}"
    environment = {**ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with running([*_serve(model), *arguments, *options], log, env=environment) as process:
        wait_until(lambda: _healthy(address), process, log, STARTING_SECONDS)
        yield address


def post(server: str, path: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Post a JSON request; return the status and the answer."""
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{server}{path}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def _serve(model: Path) -> list[str]:
    """Return `vllm serve`, or its module where vLLM is called vllm-cpu, with which that dies."""
    try:
        distribution("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(model)]


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False

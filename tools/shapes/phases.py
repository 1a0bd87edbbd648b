"""The phases of judging a checkpoint that need no engine, each timed in a process of its own."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from quantgate.subject.files import read_config
from quantgate.subject.probe import Probe, Window

SAMPLING_SECONDS = 0.05
WINDOW = 256


@dataclass(frozen=True)
class Measured:
    """What one phase took."""

    phase: str
    seconds: float
    peak_gib: float
    """Of memory that is the process' own; pages of files that the system may drop are not in it."""


def measure(directory: Path, phase: str, tokens: int) -> Measured:
    """Run a phase in a new process."""
    script = Path(__file__).resolve().parent.parent / "measure_shape.py"
    ran = subprocess.run(
        [sys.executable, str(script), str(directory), "--tokens", str(tokens), "--phase", phase],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Measured(**json.loads(ran.stdout.splitlines()[-1]))


def run(directory: Path, phase: str, tokens: int) -> str:
    """Run a phase in this process; return `Measured` as JSON."""
    prepared = PHASES[phase](directory, tokens)
    stop, peak = threading.Event(), [_own_memory()]

    def watch() -> None:
        while not stop.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], _own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    prepared()
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    return json.dumps(asdict(Measured(phase, seconds, peak[0] / 2**30)))


def _own_memory() -> int:
    """Return the bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(kib) * 1024


def random_windows(directory: Path, tokens: int) -> Probe:
    """Return a probe of random ids, in windows of `WINDOW` tokens."""
    vocabulary = read_config(directory)["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (tokens // WINDOW, WINDOW))
    windows = (Window(f"d{i}", "random", 1, tuple(row.tolist()), "") for i, row in enumerate(ids))
    return Probe("random", vocabulary, tuple(windows))


# --- phases: each returns what is timed ----------------------------------------------------------


def _identity(directory: Path, _: int) -> Callable[[], object]:
    from quantgate.subject import digests, files

    digests.KEPT_FROM = sys.maxsize  # nothing is kept, and nothing that was kept is used
    return lambda: files.identity(directory)


def _identity_again(directory: Path, _: int) -> Callable[[], object]:
    from quantgate.subject import digests, files

    files.identity(directory)
    digests._once.cache_clear()
    return lambda: files.identity(directory)


def _audit(directory: Path, _: int) -> Callable[[], object]:
    from quantgate.commands import audit

    return lambda: audit.run(directory, None, deep=False, quiet=True)


def _reference(directory: Path, tokens: int) -> Callable[[], object]:
    from quantgate.measuring import reference

    probe = random_windows(directory, tokens)
    return lambda: reference.measure(directory, probe, dtype="float32", announce=lambda _: None)


def _products(directory: Path, tokens: int) -> Callable[[], object]:
    """The reference's products alone, in float32, on weights that are there already."""
    import torch

    from shapes.models import SHAPES

    config = read_config(directory)
    shape = next(s for s in SHAPES.values() if s.hidden == config["hidden_size"])
    linears = [(o, i) for name, o, i in shape.linears() if ".experts." not in name]
    rows = tokens - tokens // WINDOW  # a window's last token predicts nothing
    weights = {(o, i): torch.rand(o, i) for o, i in {*linears, (shape.vocabulary, shape.hidden)}}
    inputs = {width: torch.rand(rows, width) for width in {i for _, i in weights}}

    def multiply() -> None:
        for _ in range(config["num_hidden_layers"]):
            for size in linears:
                torch.nn.functional.linear(inputs[size[1]], weights[size])
        head = weights[shape.vocabulary, shape.hidden]
        for part in torch.split(inputs[shape.hidden], 256):
            torch.nn.functional.linear(part, head)

    return multiply


PHASES: dict[str, Callable[[Path, int], Callable[[], object]]] = {
    "identity": _identity,
    "identity, again": _identity_again,
    "audit": _audit,
    "reference": _reference,
    "products": _products,
}

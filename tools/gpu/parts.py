"""What `make gpu` measures: parts, each a list of items, and what measures one of them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantgate.commands import doctor
from quantgate.judging import fidelity, invariance, noise
from quantgate.measuring import reference
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.engine import lacking
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import Measurement
from quantgate.measuring.precision import SERVING
from quantgate.measuring.reference_device import CPU, choose_device
from quantgate.reporting.gate_json import check_of_verdict
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.probe import probe_for, stored_probe
from quantgate.subject.scheme import UNQUANTIZED
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent.parent
DTYPES = ("bfloat16", "float16")
SHAPES = ("8b", "0.5b")
SCHEMES = ("none", "W4A16", "FP8_DYNAMIC")
WORK = ((64, 2048), (2048, 64))
SIZED = ("8b W4A16 standard", "8b W4A16 quick")
HEAD_ROWS = (64, 1024, 8192, 16384)  # the last is a step of an engine
MOST_PROCESSES = 12
MIB = 2**20

Figures = dict[str, Any]
Checkpoints = Mapping[str, Checkpoint]


@dataclass(frozen=True)
class Part:
    """One question about the kernels of a machine."""

    question: str
    items: Callable[[Checkpoints], list[str]]
    """By the selected checkpoints: the names of what is measured one by one."""
    measure: Callable[[str, Checkpoints, Path], Figures]
    """Given an item, the checkpoints and the directory for reports."""
    minutes: float
    """After which an item hangs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    on_request: bool = False
    """Whether it is measured only if it is named."""
    side_by_side: bool = False
    """Whether several processes may share the GPU, because it is no timing."""


def _case(checkpoint: Checkpoint, dtype: str) -> Case:
    def announce(text: str) -> None:
        print(f"    {text}", file=sys.stderr, flush=True)

    cache = DiskCache(ROOT / ".gate-cache")
    lab = Lab(stored_probe, Ledger(announce, cache))
    return Case.of(checkpoint, dtype, lab)


def _one_of_each_scheme(checkpoints: Checkpoints) -> list[str]:
    """Return a checkpoint of each scheme among those that generate, and of each other task."""
    first: dict[tuple[str, str], str] = {}
    for name, checkpoint in checkpoints.items():
        kind = checkpoint.scheme if checkpoint.task == GENERATE else ""
        first.setdefault((checkpoint.task, str(kind)), name)
    return list(first.values())


# The machine -------------------------------------------------------------------------------------


def machine(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return what the figures depend on, and the kernel that vLLM chooses for each format."""
    chosen = [dataclasses.asdict(found) for found in doctor.format_kernels(checkpoints)]
    return {
        **doctor.machine(),
        "device": doctor.device_name(),
        "lacks": lacking(),
        "formats": chosen,
    }


# Kernels -----------------------------------------------------------------------------------------


def formats(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return how far one checkpoint's engine is from its reference in a 16-bit dtype."""
    name, dtype = item.split(" ")
    case = _case(checkpoints[name], dtype)
    _reset_peak()
    engine = case.engine
    peak = _peak_mib()
    errors = [module.output for module in case.replay.modules]
    return {
        "scheme": case.checkpoint.scheme,
        "kernels": dict(engine.provenance.kernels),
        "emulated": list(engine.provenance.emulated),
        "replay": {
            **check_of_verdict(fidelity.replay(case)),
            "largest": float(np.max(errors)),
            "median": float(np.median(errors)),
        },
        "fidelity": check_of_verdict(fidelity.free_running(case)),
        "peak_mib": peak,
    }


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_mib() -> float | None:
    """Return the most GPU memory that tensors took; None without a GPU."""
    import torch

    return torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None


def forced(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Gate a checkpoint without the kernel that vLLM would choose: what do the verdicts say?"""
    settings = dataclasses.replace(checkpoints[item].engine, kernels="native")
    (chosen, *_), _ = doctor.linear_kernels(checkpoints[item].directory, settings)
    checks = _gate(
        out / f"forced-{item}",
        ["--checkpoint", item, "-k", "(replay or drift) and serving"],
        {"VLLM_DISABLED_KERNELS": chosen},
    )
    return {"disabled": chosen, "checks": checks}


# Ways of serving ---------------------------------------------------------------------------------


def ways(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return how far batches, order, chunks, graphs move a checkpoint, and its noise floor."""
    case = _case(checkpoints[item], SERVING)
    floor = noise.measure(case)
    return {
        **batches(item, checkpoints, out),
        "compiled": check_of_verdict(invariance.compiled(case)),
        "noise": {rerun.name: dict(rerun.moved) for rerun in floor.reruns},
    }


def batches(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return how far batches, order, chunks and the prefix cache move a checkpoint."""
    case = _case(checkpoints[item], SERVING)
    served = invariance.served_otherwise(case)
    return {"dtype": case.dtype, "invariance": check_of_verdict(served)}


def scores(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return how far score mode is from HF, on the model runner that the environment asks for."""
    name, dtype = item.split(" ")
    return {"fidelity": check_of_verdict(fidelity.free_running(_case(checkpoints[name], dtype)))}


# The reference -----------------------------------------------------------------------------------


def references(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Return how long a reference takes on the CPU and on the GPU, and how far apart the two are.

    The first pass on a device also loads its libraries, so each is timed at its second.
    """
    name, dtype = item.split(" ")
    devices = {"cpu": CPU, "gpu": choose_device()}
    passes = {of: _two_references(checkpoints[name], dtype, on) for of, on in devices.items()}
    values = {of: measured.values.astype(np.float64) for of, (measured, _) in passes.items()}
    apart = np.abs(values["gpu"] - values["cpu"])
    return {
        "device": devices["gpu"],
        "seconds": {of: seconds for of, (_, seconds) in passes.items()},
        "largest": float(apart.max()),
        "mean": float(apart.mean()),
    }


def _two_references(checkpoint: Checkpoint, dtype: str, device: str) -> tuple[Measurement, float]:
    """Return a measurement of the embedded probe, and what the second of two took in seconds."""
    whole = stored_probe(checkpoint)
    probe, _ = probe_for(whole, checkpoint.directory)
    for _ in range(2):
        started = time.monotonic()
        measured = reference.measure(
            checkpoint.directory, probe, dtype=dtype, announce=lambda _: None, device=device
        )
    return measured, time.monotonic() - started


# Whole commands ----------------------------------------------------------------------------------


def gate(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Run the gate as CI does, side by side; its reports stay in the output directory."""
    selected = [word for name in checkpoints for word in ("--checkpoint", name)]
    checks = _gate(out / "gate", ["-m", item, "-n", str(side_by_side()), *selected])
    verdicts = [check["verdict"] for check in checks]
    return {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))}


def sized(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Gate a checkpoint of random weights with the shapes of a real model, in one tier."""
    shape, scheme, tier = item.split(" ")
    directory = ROOT / "build" / "shapes" / f"{shape}-{scheme.lower()}"
    if not directory.exists():
        tool = str(ROOT / "tools" / "make_shape.py")
        subprocess.run([sys.executable, tool, shape, scheme, str(directory)], check=True)
    started = time.monotonic()
    arguments = ["--checkpoint", str(directory), "--tier", tier]
    checks = _gate(out / f"sized-{shape}-{scheme}-{tier}", arguments)
    seconds = time.monotonic() - started
    return {"seconds": seconds, "checks": {check["name"]: check["verdict"] for check in checks}}


def goldens(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Approve the goldens of this platform that are not there or do not hold, side by side."""
    names = [name for name, one in checkpoints.items() if one.golden]
    parts = [part for n in range(side_by_side()) if (part := names[n :: side_by_side()])]
    command = [sys.executable, "-m", "quantgate", "approve", "--reason", item]
    running = [
        subprocess.Popen(
            [*command, *(word for name in part for word in ("--checkpoint", name))],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        )
        for part in parts
    ]  # fmt: skip
    failed = [part for done, part in zip(running, parts, strict=True) if done.wait() != 0]
    return {"asked": len(names), "refused among": [name for part in failed for name in part]}


def side_by_side() -> int:
    """Return how many processes share the machine: small engines leave most of a GPU idle."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def _gate(
    report: Path, arguments: list[str], environment: Mapping[str, str] | None = None
) -> list[Figures]:
    command = [sys.executable, "-m", "pytest", "suites", *arguments, "--gate-report", str(report)]
    path = report / "gate.json"
    path.unlink(missing_ok=True)  # an earlier run's
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, check=False,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if not path.exists():
        raise RuntimeError(f"{' '.join(command)}: {done.stdout.strip().splitlines()[-1]}")
    content = json.loads(path.read_text(encoding="utf-8"))
    return [
        {"checkpoint": one["id"], **check}
        for one in content["checkpoints"]
        for check in one["checks"]
    ]


def speed(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Run tools/bench_score.py on one shape and scheme, for each amount of work."""
    shape, scheme = item.split(" ")
    prompts, tokens = ([str(amount) for amount in amounts] for amounts in zip(*WORK, strict=True))
    return _bench(
        "bench_score.py", "--shape", shape, "--scheme", scheme, "--skip", "hf",
        "--skip", "lm-eval", "--rounds", "2", "--prompts", *prompts, "--tokens", *tokens,
    )  # fmt: skip


def head(item: str, checkpoints: Checkpoints, out: Path) -> Figures:
    """Run tools/bench_head.py on one shape and number of rows."""
    shape, rows = item.split(" ")
    return _bench("bench_head.py", "--shape", shape, "--rows", rows)


def _bench(tool: str, *arguments: str) -> Figures:
    """Run a benchmark in a process of its own; return what it writes as JSON."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bench.json"
        command = [sys.executable, str(ROOT / "tools" / tool), *arguments, "--json", str(path)]
        subprocess.run(command, check=True)
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
    return found


def _references(checkpoints: Checkpoints) -> list[str]:
    dtypes = ("float32", "float64")
    return [f"{name} {dtype}" for name in _one_of_each_scheme(checkpoints) for dtype in dtypes]


def _in_both(checkpoints: Checkpoints) -> list[str]:
    return [f"{name} {dtype}" for name in checkpoints for dtype in DTYPES]


def _runner_items(checkpoints: Checkpoints) -> list[str]:
    chosen = [n for n in _one_of_each_scheme(checkpoints) if checkpoints[n].task == GENERATE]
    whole = [f"{n} float32" for n in chosen if checkpoints[n].scheme == UNQUANTIZED]
    return [*whole, *(f"{n} {SERVING}" for n in chosen)]


def _quantized(checkpoints: Checkpoints) -> list[str]:
    chosen = _one_of_each_scheme(checkpoints)
    return [n for n in chosen if checkpoints[n].scheme != UNQUANTIZED and checkpoints[n].golden]


def _speed_items(checkpoints: Checkpoints) -> list[str]:
    """Return every shape and scheme; unquantized comes first."""
    return [f"{shape} {scheme}" for scheme in SCHEMES for shape in SHAPES]


def _head_items(checkpoints: Checkpoints) -> list[str]:
    return [f"{shape} {rows}" for shape in SHAPES for rows in HEAD_ROWS]


# In the order in which they are measured: what tells most comes first.
PARTS: dict[str, Part] = {
    "machine": Part("which kernel does vLLM choose?", lambda _: ["here"], machine, 20),
    "goldens": Part(
        "which goldens are missing here?", lambda _: ["First goldens of this platform"], goldens,
        60, on_request=True,
    ),
    "gate": Part("is the gate green?", lambda _: ["gpu"], gate, 60),
    "formats": Part(
        "does each format's kernel compute what it says?", _in_both, formats, 5, side_by_side=True
    ),
    "speed": Part("how fast is score mode?", _speed_items, speed, 30),
    "head": Part("how fast and exact is its head, and what else could be?", _head_items, head, 10),
    "sized": Part(
        "how long does the gate of a model of real size take?", lambda _: list(SIZED), sized, 30
    ),
    "runner-v1": Part(
        "does model runner V1 score as HF does?", _runner_items, scores, 5,
        {"VLLM_USE_V2_MODEL_RUNNER": "0"}, side_by_side=True,
    ),
    "runner-v2": Part(
        "does model runner V2?", _runner_items, scores, 5,
        {"VLLM_USE_V2_MODEL_RUNNER": "1"}, side_by_side=True,
    ),
    "reference": Part(
        "does the reference compute on the GPU what it computes on the CPU?", _references,
        references, 60,
    ),
    "ways": Part(
        "does it matter how it is served?", _one_of_each_scheme, ways, 10, side_by_side=True
    ),
    "batch-invariant": Part(
        "and in batch-invariant mode?", _one_of_each_scheme, batches, 10,
        {"VLLM_BATCH_INVARIANT": "1"}, side_by_side=True,
    ),
    "forced": Part("is another kernel noticed?", _quantized, forced, 10, side_by_side=True),
}  # fmt: skip

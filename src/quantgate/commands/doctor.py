"""Report what this machine can certify: vLLM, devices, each format's kernel, what is missing."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from quantgate.commands.companions import broken
from quantgate.errors import BadInput
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.processor import has_vnni, processor_name
from quantgate.subject.task import GENERATE

UNQUANTIZED_KERNEL = "Unquantized"


@dataclass(frozen=True)
class FormatKernel:
    """The kernels that vLLM chooses for a format's linears on this machine."""

    scheme: str
    kernels: str
    """Kernel names, or why the format cannot be served."""
    certifies: bool
    """Whether a verdict on this format is evidence about the real kernel."""


def linear_kernels(directory: Path, settings: EngineSettings) -> tuple[list[str], bool]:
    """Load a checkpoint; return the kernels of its linears, and whether any is emulated."""
    from quantgate.measuring.engine import running_engine
    from quantgate.measuring.session import kernel_fingerprint

    with running_engine(directory, settings=settings, dtype="bfloat16") as llm:
        kernels, emulated = kernel_fingerprint(llm)
    return names_of_linears(kernels), bool(emulated)


def names_of_linears(kernels: Mapping[str, str]) -> list[str]:
    """Return the kernels of a fingerprint's quantized linears, or of all if none is quantized."""
    linears = (joined for kind, joined in kernels.items() if kind.endswith("_proj"))
    names = dict.fromkeys(name for joined in linears for name in joined.split(" + "))
    quantized = [name for name in names if not name.startswith(UNQUANTIZED_KERNEL)]
    return quantized or list(names)


def format_kernels(checkpoints: Mapping[str, Checkpoint]) -> Iterator[FormatKernel]:
    """Yield the native kernel of each scheme among embedded checkpoints, by loading one of each."""
    from quantgate.measuring.engine_failure import EngineFailure

    by_scheme: dict[str, Checkpoint] = {}
    for checkpoint in checkpoints.values():
        if checkpoint.task == GENERATE and checkpoint.scheme is not None:
            by_scheme.setdefault(checkpoint.scheme, checkpoint)
    for scheme, checkpoint in sorted(by_scheme.items()):
        native = replace(checkpoint.engine, kernels="native", enforce_eager=True)
        try:
            names, emulated = linear_kernels(checkpoint.directory, native)
        except (EngineFailure, BadInput) as error:
            yield FormatKernel(scheme, str(error), certifies=False)
            continue
        shown = ", ".join(names)
        yield FormatKernel(scheme, f"emulated ({shown})" if emulated else shown, not emulated)


def machine() -> dict[str, str]:
    """Return the versions, processor and GPUs that verdicts depend on."""
    import torch

    from quantgate.measuring.environment import library_versions

    found = dict(library_versions())
    found["GPUs"] = gpu_names() or "none: no CUDA kernel can be certified here"
    found["processor"] = torch.backends.cpu.get_cpu_capability() + (
        ", VNNI" if has_vnni() else ", no VNNI: stock int8 kernels saturate"
    )
    return found


def gpu_names() -> str:
    """Return the GPUs that torch sees, with their memory; "" without any."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(
        f"{gpu.name} sm{gpu.major}{gpu.minor} {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus
    )


def device_name() -> str:
    """Return the device of a measurement: GPUs and their driver, or the processor."""
    if (gpus := gpu_names()) and (driver := driver_version()):
        return f"{gpus}, driver {driver}"
    return gpus or processor_name()


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "" if it is unknown."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.split("\n")[0].strip()


def missing(root: Path, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return what is missing and what it is needed for."""
    from quantgate.measuring.engine import lacking

    found = lacking()
    found += [f"a {name} that fits this torch: pip uninstall {name}" for name in broken()]
    unbuilt = [
        checkpoint.id
        for checkpoint in checkpoints.values()
        if checkpoint.source.startswith("./") and not (root / checkpoint.source).is_dir()
    ]
    if unbuilt:
        found.append(f"{len(unbuilt)} embedded checkpoints are not built: run `make checkpoints`")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        found.append("no C++ compiler: `compiled` checks on CPU need one")
    if (root / "tests").is_dir() and shutil.which("chromium") is None:
        found.append("no chromium: the report's own tests are not run")
    return found


def cache_state(directory: Path) -> str:
    """Return the number and total size of a cache's measurements."""
    entries = list(directory.glob("*.safetensors")) if directory.is_dir() else []
    size = sum(entry.stat().st_size for entry in entries)
    return f"{directory}: {len(entries)} measurements, {size / 2**20:.0f} MiB"


def report(
    root: Path, checkpoints: Mapping[str, Checkpoint], announce: Callable[[str], None]
) -> str:
    """Return the whole report as text; each format takes about a second to load."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = io.StringIO()
    console = Console(file=stream, width=118, no_color=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in (machine() | {"cache": cache_state(root / ".gate-cache")}).items():
        table.add_row(Text(name), Text(value))
    console.print(table)
    table = Table("format", "certified here", "kernel", box=None, pad_edge=False)
    built = {
        name: checkpoint
        for name, checkpoint in checkpoints.items()
        if not checkpoint.source.startswith(".") or (root / checkpoint.source).is_dir()
    }
    for found in format_kernels(built):
        announce(found.scheme)
        certifies = "yes" if found.certifies else "loading, packing and fusing only"
        table.add_row(Text(found.scheme), Text(certifies), Text(found.kernels))
    console.print()
    console.print(
        table
        if built
        else Text("formats: one line for each checkpoint's, once it is in fixtures/checkpoints")
    )
    for line in missing(root, checkpoints):
        console.print(Text(f"missing: {line}"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"

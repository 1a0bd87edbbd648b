"""Write the tables of formats in README.md and docs/pooling.md from a gate run.

    make gate
    python tools/formats_table.py

A row of the README says which kernel serves a format in the gate, which one of its own vLLM's CPU
build takes on a machine with AVX-512 (what the table says is kept on another), how far the engine
is from its reference, and what docs/gpu.md has of the kernel and its replay on a GPU. A row of
docs/pooling.md says the first of a model that labels, rewards or embeds, and what its task came to.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantgate.atomic import write_atomically
from quantgate.commands.doctor import linear_kernels
from quantgate.errors import BadInput
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.reporting.markdown import markdown_table
from quantgate.subject import processor
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import actual_scheme
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
POOLING = ROOT / "docs" / "pooling.md"
GPU = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- formats: tools/formats_table.py writes this -->\n", "<!-- end of formats -->\n"
HEADINGS = (
    "format",
    "checkpoint",
    "kernel",
    "vLLM's own",
    "fp32, max",
    "replay, mean",
    "bf16, mean",
    "on an H200",
    "replay there, max",
)
POOLING_HEADINGS = (
    "task",
    "checkpoint",
    "format",
    "fp32, max",
    "replay, max",
    "bf16, mean",
    "base → quantized",
)
# What vLLM's build with most kernels of its own needs.
AVX512 = frozenset({"avx512_vnni", "avx512_bf16"})
# Built by tools/quantize_tiny.py and refused by vLLM, so that there is nothing to gate.
NOT_LOADABLE = ("tiny-llama-w4a16-actorder",)


def native_kernel(checkpoint: Checkpoint) -> str:
    """Return the kernel that vLLM itself has for a checkpoint with AVX-512 alone, or "none".

    On another machine it is what the README says: with AMX, vLLM has kernels of other rules.
    """
    if not AVX512 <= processor.flags() or processor.has_amx():
        return written_kernel(checkpoint.id)
    settings = replace(checkpoint.engine, kernels="native")
    names, emulated = linear_kernels(checkpoint.directory, settings)
    return "none" if emulated else _code(names)


def written_kernel(checkpoint_id: str) -> str:
    """Return what the README's row of a checkpoint says of vLLM's own kernel."""
    lines = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    row = next((line for line in lines if f" | {checkpoint_id} | " in line), None)
    if row is None:
        raise BadInput(
            f"{README}: no row of {checkpoint_id}, and its kernel is asked of a machine with "
            "AVX-512; write the row there."
        )
    return row.split(" | ")[HEADINGS.index("vLLM's own")]


def on_gpu(checkpoint_id: str) -> list[str]:
    """Return what docs/gpu.md says of a checkpoint: its kernels, and the largest replay error."""
    lines = GPU.read_text(encoding="utf-8").splitlines()
    row = next((line for line in lines if line.startswith(f"| {checkpoint_id} | ")), None)
    return ["–", "–"] if row is None else row.strip("| ").split(" | ")[2:4]


def refusal(directory: Path) -> str:
    """Return why vLLM does not load a checkpoint; an error where it does after all."""
    try:
        linear_kernels(directory, EngineSettings(enforce_eager=True, kernels="portable"))
    except EngineFailure as error:
        return str(error).partition(": ")[2].replace("|", "\\|")
    raise BadInput(f"{directory}: vLLM loads it by now; give it a file in fixtures/checkpoints.")


def rows(report: dict[str, Any], checkpoints: dict[str, Checkpoint]) -> list[list[str]]:
    """Return the table's cells, a row for each checkpoint of the report with portable kernels."""
    found = []
    for entry in report["checkpoints"]:
        checkpoint = checkpoints[entry["id"]]
        if checkpoint.engine.kernels != "portable" or checkpoint.task != GENERATE:
            continue
        checks = {check["name"]: check for check in entry["checks"]}
        found.append(
            [
                entry["scheme"],
                entry["id"],
                "emulated" if entry["emulated"] else "native",
                native_kernel(checkpoint),
                figure(checks["fidelity-float32"], "max"),
                figure(checks["replay-float32"], "mean"),
                figure(checks["fidelity-serving"], "mean"),
                *on_gpu(entry["id"]),
            ]
        )
    for name in NOT_LOADABLE:
        directory = ROOT / "build" / name
        found.append([actual_scheme(directory), name, "not loadable", refusal(directory), *"–––––"])
    return found


def pooling_rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table's cells, a row for each checkpoint of the report that pools."""
    found = []
    for entry in report["checkpoints"]:
        if entry["task"] == GENERATE:
            continue
        checks = {check["name"]: check for check in entry["checks"]}
        task = "–"  # a model that generates is judged by its perplexity
        if "quality" in checks:
            (metric, value), (_, base) = checks["quality"]["figures"].items()
            task = f"{metric} {base:.4f} → {value:.4f}"
        found.append(
            [
                entry["task"],
                entry["id"],
                entry["scheme"],
                figure(checks["fidelity-float32"], "max"),
                figure(checks["replay-float32"], "max"),
                figure(checks["fidelity-serving"], "mean"),
                task,
            ]
        )
    return found


def figure(check: dict[str, Any], kind: str) -> str:
    """Return a check's mean or largest |Δ| of what it compares; with its verdict unless a pass."""
    (value,) = (f"{v:.1e}" for name, v in check["figures"].items() if name.startswith(f"{kind} |Δ"))
    return value if check["verdict"] == "pass" else f"{value} ({check['verdict']})"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def put(document: Path, table: str) -> None:
    """Write a table between the two marks of a document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    write_atomically(document, f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> int:
    """Write both tables between their marks."""
    parser = argparse.ArgumentParser(description="Write the tables of formats.")
    parser.add_argument("--report", type=Path, default=ROOT / "report" / "gate.json")
    path = parser.parse_args().report
    try:
        if not path.exists():
            raise BadInput(f"{path}: no such report; run `make gate` first.")
        report = json.loads(path.read_text())
        put(README, markdown_table(HEADINGS, rows(report, read_checkpoint_files(ROOT))))
        put(POOLING, markdown_table(POOLING_HEADINGS, pooling_rows(report)))
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

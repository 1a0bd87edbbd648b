"""Measure the head alone: score mode's kernel and its alternatives beside cuBLAS's own product.

    python tools/bench_head.py --json head.json
    python tools/bench_head.py --shape 0.5b --rows 64 --rows 8192 --only fused
    python tools/bench_head.py --device cpu --shape smallest --rows 5

The floor is what no exact score does without: one product of the rows with the head, in bfloat16
and rounded to it, by cuBLAS. All candidates run in turn, round after round, because clocks and
temperature drift: the ratios to the floor compare, the milliseconds less so. Beside them stand the
largest error of a log-probability against float64, and how far a row's score moves when other rows
are left out of its batch. `--device cpu` tries the command in Triton's interpreter, which says
nothing about speed.

`head_plan.plan_for` is the rule that these figures are for.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gpu.head import FLOOR, Figures, Work, candidates, measure
from quantgate.atomic import write_atomically
from quantgate.commands.doctor import device_name
from quantgate.measuring.environment import library_versions

# Hidden size and vocabulary of Llama 3.1 8B and of Qwen2.5 0.5B; and some that take no time.
SHAPES = {"8b": (4096, 128256), "0.5b": (896, 151936), "smallest": (128, 300)}
ROWS = (64, 1024, 8192)


def show(title: str, figures: Mapping[str, Figures]) -> None:
    """Print one shape's table."""
    table = Table("", "ms", "× the floor", "largest error", "moved by its batch", title=title)
    for name, one in figures.items():
        if one.failed is not None:
            table.add_row(name, f"not run: {one.failed}")
            continue
        table.add_row(
            name,
            f"{one.milliseconds:.3f}",
            f"{one.of_floor:.2f}",
            "" if one.error is None else f"{one.error:.1e}",
            "" if one.batch is None else f"{one.batch:.1e}",
        )
    Console().print(table)


def parse_arguments() -> argparse.Namespace:
    """Return what to measure."""
    parser = argparse.ArgumentParser(description="Measure the head's kernels beside cuBLAS.")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="default: 8b and 0.5b")
    parser.add_argument("--rows", action="append", type=int, help="default: 64, 1024 and 8192")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", metavar="TEXT", help="candidates whose name has this in it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="write every figure here")
    arguments = parser.parse_args()
    if min(arguments.rows or ROWS) < 1 or arguments.rounds < 1:
        parser.error("--rows and --rounds are at least 1")
    return arguments


def main() -> int:
    """Measure; 2 where there is no GPU."""
    arguments = parse_arguments()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: no GPU here: torch sees none, and the kernels' speed is that of one; "
            "--device cpu tries the command in Triton's interpreter.",
            file=sys.stderr,
        )
        return 2
    measured = []
    for shape in arguments.shape or ("8b", "0.5b"):
        for rows in arguments.rows or ROWS:
            work = Work.random(rows, *SHAPES[shape], arguments.device)
            chosen = {
                name: run
                for name, run in candidates(work).items()
                if arguments.only is None or name == FLOOR or arguments.only in name
            }
            with torch.inference_mode():
                figures = measure(work, chosen, arguments.rounds)
            show(f"{shape}, {rows:,} rows", figures)
            of = {name: asdict(one) for name, one in figures.items()}
            measured.append({"shape": shape, "rows": rows, "candidates": of})
    if arguments.json is not None:
        content = {
            "device": device_name(),
            "versions": library_versions(),
            "interpreted": arguments.device == "cpu",
            "measured": measured,
        }
        write_atomically(arguments.json, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

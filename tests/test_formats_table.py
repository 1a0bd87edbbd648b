"""The README's table of formats is what its command writes, of these checkpoints, here and now."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from quantgate import processor
from quantgate.checkpoint import EngineSettings, read_checkpoint_files

Rows = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("formats_table")


@pytest.fixture(scope="module")
def written(table: ModuleType, root: Path) -> Rows:
    """The README's rows, by checkpoint."""
    text = (root / "README.md").read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cell[1]: dict(zip(table.HEADINGS, cell, strict=True)) for cell in cells}


def test_every_checkpoint_has_a_row(table: ModuleType, written: Rows, root: Path) -> None:
    checkpoints = read_checkpoint_files(root)
    portable = [n for n, c in checkpoints.items() if c.engine.kernels == "portable"]
    assert sorted(written) == sorted([*portable, *table.NOT_LOADABLE])
    for name in portable:
        assert written[name]["format"] == checkpoints[name].scheme


def test_what_is_not_loadable_is_refused_in_these_words(
    table: ModuleType, written: Rows, root: Path
) -> None:
    for name in table.NOT_LOADABLE:
        assert written[name]["kernel"] == "not loadable"
        assert written[name]["vLLM's own"] == table.refusal(root / "build" / name)


def test_the_kernels_are_those_that_serve(table: ModuleType, written: Rows, root: Path) -> None:
    for name, checkpoint in read_checkpoint_files(root).items():
        if name not in written:
            continue
        settings = EngineSettings(**vars(checkpoint.engine))
        _, emulated = table.linear_kernels(checkpoint.directory, settings)
        assert written[name]["kernel"] == ("emulated" if emulated else "native")
        if {"avx512_vnni", "avx512_bf16"} <= processor.flags():
            assert written[name]["vLLM's own"] == table.native_kernel(checkpoint)


def test_the_figures_are_those_of_the_last_gate(
    table: ModuleType, written: Rows, root: Path
) -> None:
    """Within a factor of 5: another processor adds up in another order."""
    report = root / "report" / "gate.json"
    if not report.exists():
        pytest.skip("`make gate` writes report/gate.json")
    figures = {"fp32, max": 0, "replay, mean": 0, "bf16, mean": 0}
    for entry in json.loads(report.read_text())["checkpoints"]:
        if entry["id"] not in written:
            continue
        checks = {check["name"]: check for check in entry["checks"]}
        for heading, check, kind in (
            ("fp32, max", "fidelity-float32", "max"),
            ("replay, mean", "replay-float32", "mean"),
            ("bf16, mean", "fidelity-serving", "mean"),
        ):
            if check in checks:
                fresh = checks[check]["figures"][f"{kind} |Δ log-prob|"]
                assert fresh / 5 <= float(written[entry["id"]][heading]) <= fresh * 5
                figures[heading] += 1
    assert any(figures.values())

"""The tables of formats are what their command writes, of these checkpoints, here and now."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from quantgate.subject import processor
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.task import GENERATE

Rows = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("formats_table")


@pytest.fixture(scope="module")
def written(table: ModuleType) -> Rows:
    """The README's rows, by checkpoint."""
    return rows_of(table.README, table.HEADINGS, table)


@pytest.fixture(scope="module")
def pooling(table: ModuleType) -> Rows:
    """The rows of docs/pooling.md, by checkpoint."""
    return rows_of(table.POOLING, table.POOLING_HEADINGS, table)


def rows_of(document: Path, headings: Sequence[str], table: ModuleType) -> Rows:
    text = document.read_text().partition(table.BEGIN)[2].partition(table.END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cell[1]: dict(zip(headings, cell, strict=True)) for cell in cells}


def test_every_checkpoint_has_a_row(
    table: ModuleType, written: Rows, pooling: Rows, root: Path
) -> None:
    checkpoints = read_checkpoint_files(root)
    portable = [n for n, c in checkpoints.items() if c.engine.kernels == "portable"]
    pools = [name for name in portable if checkpoints[name].task != GENERATE]
    generates = [name for name in portable if name not in pools]
    assert sorted(written) == sorted([*generates, *table.NOT_LOADABLE])
    assert sorted(pooling) == sorted(pools)
    for name in portable:
        assert {**written, **pooling}[name]["format"] == checkpoints[name].scheme


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
        if table.AVX512 <= processor.flags():
            assert written[name]["vLLM's own"] == table.native_kernel(checkpoint)


def test_a_gpus_columns_are_what_its_page_says(table: ModuleType, written: Rows) -> None:
    for name, row in written.items():
        assert [row["on an H200"], row["replay there, max"]] == table.on_gpu(name)
    assert written["tiny-llama-w4a16"]["on an H200"] == "`Machete`"


def test_the_figures_are_those_of_the_last_gate(
    table: ModuleType, written: Rows, pooling: Rows, root: Path
) -> None:
    """Where a check passes, its figure is one of rounding, and another processor's is too."""
    report = root / "report" / "gate.json"
    if not report.exists():
        pytest.skip("`make gate` writes report/gate.json")
    # The largest of many flips is the size of one, which differs from machine to machine.
    known = read_checkpoint_files(root)
    chaotic = {name: checkpoint.quantizes_activations for name, checkpoint in known.items()}
    compared = 0
    for entry in json.loads(report.read_text())["checkpoints"]:
        row = {**written, **pooling}.get(entry["id"], {})
        for check in entry["checks"]:
            heading = CHECKS.get(check["name"], "")
            kind = next((kind for kind in ("max", "mean") if f"{heading}, {kind}" in row), None)
            if kind is None or (kind == "max" and chaotic[entry["id"]]):
                continue
            if check["verdict"] == "pass":
                fresh, stored = table.figure(check, kind), row[f"{heading}, {kind}"].split()[0]
                assert alike(float(fresh), float(stored)), (entry["id"], heading, fresh, stored)
                compared += 1
    assert compared


def alike(one: float, other: float) -> bool:
    """Whether two processors may have these figures of one checkpoint, if neither is wrong.

    A figure is the distance of two roundings of one computation, which have the same size on every
    processor: their distance is at most their sum, so twice that of one. Another processor's may
    be half of that again, as its kernels have twice the lanes, and so sums of half the length.
    Where engine and reference run the very same kernel there is no distance, as an encoder's in
    float32 on some processors, and the figure says nothing of another one.
    """
    small, large = sorted((one, other))
    return small < SAME_KERNEL or large <= 4 * small


# Below it no format's codes flip: then it is a float32 rounding of single values (FP32_MAX).
SAME_KERNEL = 1e-5


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [(1e-3, 3e-3, True), (1e-3, 5e-3, False), (0.0, 5e-2, True), (5e-2, 2e-3, False)],
)
def test_figures_of_another_size_are_not_alike(one: float, other: float, expected: bool) -> None:
    assert alike(one, other) == alike(other, one) == expected


# The figures' headings by the check that they are of.
CHECKS = {"fidelity-float32": "fp32", "replay-float32": "replay", "fidelity-serving": "bf16"}

"""The model of tensor cores that the depth of a block is chosen by."""

import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from quantgate.judging.budget import fp8_sum_error
from quantgate.patches.scoremode.head_plan import DEPTH_BLOCK


@pytest.fixture
def model(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("simulate_tensor_cores")


def test_it_truncates_towards_zero_and_keeps_extra_bits(model: ModuleType) -> None:
    core = model.TensorCore(step=2, extra_bits=2)
    one, half = np.array([1.0]), 2.0**-24  # half a unit in the last place of 1
    assert core.add(one, np.array([[half, 0.0]])) == 1.0
    assert core.add(-one, np.array([[-half, 0.0]])) == -1.0
    assert core.add(one, np.array([[half, half]])) == 1 + 2 * half
    # A quarter is the last bit that is aligned, an eighth is lost before it is added.
    assert core.add(one, np.array([[half * 1.5, half / 2]])) == 1 + 2 * half
    assert core.add(one, np.array([[half * 1.75, half / 4]])) == 1.0


def test_bfloat16_rounds_to_the_nearest_even(model: ModuleType) -> None:
    ulp = 2.0**-7
    values = np.array([1 + ulp / 2, 1 + ulp * 1.5, -1 - ulp * 0.75])
    assert model.bfloat16(values).tolist() == [1.0, 1 + 2 * ulp, -1 - ulp]


def test_blocks_of_the_kernels_depth_are_exact_enough(model: ModuleType) -> None:
    """At hidden 4,096; one chain is not, and twice the depth is about twice the error."""
    sample, core = model.Sample.random(96, 9, 4096), model.TensorCore()
    error = {b: np.abs(sample.errors(core, b)).max() for b in (None, 2 * DEPTH_BLOCK, DEPTH_BLOCK)}
    assert error[None] > 1e-5
    assert error[DEPTH_BLOCK] < 7e-6
    assert 1.5 < error[2 * DEPTH_BLOCK] / error[DEPTH_BLOCK] < 4


@pytest.mark.parametrize("depth", [256, 1024, 4096])
def test_a_sum_in_fp8_cores_is_within_its_limit(model: ModuleType, depth: int) -> None:
    """32 products at a time, 13 bits behind the point; and the limit is not far beyond."""
    core, generator = model.TensorCore(step=32, extra_bits=14 - 24), np.random.default_rng(0)
    x, y = (e4m3(generator.standard_normal((600, depth))) for _ in range(2))
    exact = (x * y).sum(axis=1)
    off = core.dot(x, y) - exact
    error = float(np.sqrt((off**2).mean() / (exact**2).mean()))
    assert fp8_sum_error(depth) / 5 < error < fp8_sum_error(depth)


def e4m3(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round rows to E4M3, scaled so that the largest is 448."""
    scaled = values / np.abs(values).max(axis=1, keepdims=True) * 448
    return torch.from_numpy(scaled).to(torch.float8_e4m3fn).double().numpy()


def test_it_prints_a_table(
    model: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--hidden", "512", "--rows", "8", "--columns", "4"]
    monkeypatch.setattr(sys, "argv", ["simulate_tensor_cores.py", *arguments])
    assert model.main() == 0
    printed = capsys.readouterr().out
    assert "one chain" in printed
    assert " 256 " in printed

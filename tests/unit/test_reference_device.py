"""What goes together in a step, which device it is, and exact arithmetic on it."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.measuring.read_ahead import read_ahead
from quantgate.measuring.reference_device import TOKENS_PER_STEP, choose_device, exactly, together

# Windows together -------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 3 * TOKENS_PER_STEP // 2), max_size=40))
def test_only_windows_of_one_length_go_together(lengths: list[int]) -> None:
    groups = together(lengths, torch.device("cuda"))
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    for group in groups:
        assert len({lengths[place] for place in group}) == 1
        assert len(group) == 1 or len(group) * lengths[group[0]] <= TOKENS_PER_STEP
    assert together(lengths, torch.device("cpu")) == [[place] for place in range(len(lengths))]
    assert together([96] * 5, torch.device("cuda")) == [[0, 1, 2, 3, 4]]


# Reading ahead ----------------------------------------------------------------------------------


def test_the_next_part_is_read_while_one_is_in_use() -> None:
    reading = threading.Event()

    def read(index: int) -> str:
        if index == 1:
            reading.set()
        return f"part {index}"

    parts = read_ahead(read, 3)
    assert next(parts) == "part 0"
    assert reading.wait(10)
    assert list(parts) == ["part 1", "part 2"]


# Exact arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["default", "allow_tf32", "fp32_precision"])
def test_no_product_is_in_tf32_and_settings_come_back(before: str) -> None:
    """However TF32 was allowed: by torch's old name for it, or by the new one alone."""
    products = torch.backends.cuda.matmul
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    untouched = products.fp32_precision, convolutions.fp32_precision
    try:
        if before == "allow_tf32":
            products.allow_tf32 = True
        elif before == "fp32_precision":
            products.fp32_precision = "tf32"
        allowed = products.fp32_precision, convolutions.fp32_precision
        with exactly(torch.device("cuda")):
            assert (products.fp32_precision, products.allow_tf32) == ("ieee", False)
            assert convolutions.fp32_precision == "ieee"
            assert fused_attention() == (False, False)
            assert torch.is_inference_mode_enabled()
        assert (products.fp32_precision, convolutions.fp32_precision) == allowed
        assert fused_attention() == (True, True)
        with exactly(torch.device("cpu")):
            assert (products.fp32_precision, convolutions.fp32_precision) == allowed
            assert fused_attention() == (True, True)
    finally:
        torch.set_float32_matmul_precision("highest")
        products.fp32_precision, convolutions.fp32_precision = untouched


def fused_attention() -> tuple[bool, bool]:
    backends: Any = torch.backends.cuda
    return backends.mem_efficient_sdp_enabled(), backends.flash_sdp_enabled()


# Which device it is -----------------------------------------------------------------------------


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, default in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device() == default
        assert choose_device("cpu") == "cpu"
    assert choose_device("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="--reference-device cuda: torch sees no GPU here; leave"):
        choose_device("cuda")

"""What quantization may cost depends on the format and on the model's size."""

import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from quantgate.judging.budget import SCHEME_BUDGETS, quality_margin
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import parameters_of


def checkpoint_with_base_of(parameters: int, root: Path) -> Checkpoint:
    base = root / "base"
    base.mkdir()
    # A sparse file: a header, and a hole where the weights would be.
    save_file({"a": np.zeros((2, 3), np.float32)}, base / "model.safetensors")
    header = f'{{"a":{{"dtype":"U8","shape":[{parameters}],"data_offsets":[0,{parameters}]}}}}'
    with (base / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header.encode())
        stream.truncate(8 + len(header) + parameters)
    return Checkpoint("c", "./c", base="./base", root=root)


@pytest.mark.parametrize(
    ("parameters", "scheme", "margin"),
    [
        (3_000_000, "W4A16", 0.0722),
        (135_000_000, "W4A16", 0.118),
        (135_000_000, "NVFP4", 0.118),
        (135_000_000, "W8A8", 0.0186),
        (135_000_000, "FP8_DYNAMIC+W4A16", 0.118),
        (350_000_000, "MXFP4A16", 0.097),
        (1_000_000_000, "W4A16", 0.0722),
    ],
)
def test_a_small_model_is_allowed_what_four_bits_cost_small_models(
    tmp_path: Path, parameters: int, scheme: str, margin: float
) -> None:
    checkpoint = checkpoint_with_base_of(parameters, tmp_path)
    assert parameters_of(tmp_path / "base") == parameters
    assert quality_margin(checkpoint, scheme) == margin


def test_without_a_base_the_size_is_not_known_and_the_strictest_holds() -> None:
    assert quality_margin(Checkpoint("c", "./c"), "W4A16") == 0.0722


def test_margins_are_the_logarithms_of_their_sources() -> None:
    for budget, (base, quantized) in zip(
        SCHEME_BUDGETS,
        ((27.65, 31.12), (22.00, 24.24), (6.233160, 6.700147), (23.864, 24.313)),
        strict=True,
    ):
        assert budget.margin == pytest.approx(math.log(quantized / base), abs=5e-4)

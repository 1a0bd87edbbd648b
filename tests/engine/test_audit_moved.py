"""Weights that were moved on purpose are told from weights that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from audit_damages import ROOT, base_tensors
from harness import LLMCOMPRESSOR
from raw_checkpoint import RawCheckpoint, Tensor

from quantgate.audit.decode import Floats
from quantgate.audit.finding import Finding
from quantgate.audit.rules import audit

BASE = ROOT / "fixtures" / "tiny" / "llama"
LAYER = "model.layers.1."
NORM = f"{LAYER}post_attention_layernorm.weight"
V_PROJ, O_PROJ = (f"{LAYER}self_attn.{own}_proj" for own in ("v", "o"))
GATE, UP, DOWN = (f"{LAYER}mlp.{own}_proj" for own in ("gate", "up", "down"))
# By the name of their recipe in tools/make_llmcompressor.py.
MADE = ("fp8-dynamic", "nvfp4", "w4a16", "w4a16-awq", "w4a16-gptq", "w8a8", "w8a8-smoothquant-gptq")
made_by_llmcompressor = pytest.mark.skipif(
    not (ROOT / LLMCOMPRESSOR).is_dir(), reason="python3 tools/make_llmcompressor.py makes them"
)


def quantized(checkpoint: RawCheckpoint, module: str, weight: Floats) -> None:
    """Put a weight, rounded to int8 with a scale for each row, in place of a module's."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127.5
    stored = checkpoint.tensors[f"{module}.weight_scale"].with_values(scale)
    codes = np.clip(np.rint(weight / stored.floats.reshape(-1, 1)), -128, 127).astype(np.int8)
    checkpoint.tensors[f"{module}.weight_scale"] = stored
    checkpoint.tensors[f"{module}.weight"] = Tensor("I8", codes.shape, codes.view(np.uint8).ravel())


def smoothed(checkpoint: RawCheckpoint) -> None:
    """As SmoothQuant and AWQ do: a norm by factors, and rows of up_proj by others."""
    chance, base = np.random.default_rng(0), base_tensors()
    inputs = chance.lognormal(0, 0.5, 256).astype(np.float32)
    inner = chance.lognormal(0, 0.5, 512).astype(np.float32)
    checkpoint.tensors[NORM] = base[NORM].with_values(np.divide(base[NORM].floats, inputs))
    quantized(checkpoint, GATE, base_weight(GATE) * inputs)
    quantized(checkpoint, UP, np.divide(base_weight(UP) * inputs, inner[:, None]))
    quantized(checkpoint, DOWN, base_weight(DOWN) * inner)


def in_int4(checkpoint: RawCheckpoint, module: str, weight: Floats) -> None:
    """Put a weight, rounded to int4 in groups of 128, in place of a module's."""
    count, columns = weight.shape
    groups = weight.reshape(count, -1, 128)
    scale = np.abs(groups).max(axis=2) / np.float32(7.5)
    stored = checkpoint.tensors[f"{module}.weight_scale"].with_values(scale)
    codes = np.clip(np.rint(groups / stored.floats.reshape(count, -1, 1)), -8, 7) + 8
    nibbles = codes.astype(np.uint8).reshape(count, columns)
    packed = np.ascontiguousarray(nibbles[:, ::2] | (nibbles[:, 1::2] << 4)).ravel()
    checkpoint.tensors[f"{module}.weight_scale"] = stored
    checkpoint.tensors[f"{module}.weight_packed"] = Tensor("I32", (count, columns // 8), packed)


def awq_of_attention(checkpoint: RawCheckpoint) -> None:
    """Scale what an attention takes, and its values, of which each head serves two of queries."""
    chance, base = np.random.default_rng(1), base_tensors()
    inputs, values = (chance.lognormal(0, 0.4, n).astype(np.float32) for n in (256, 128))
    norm = f"{LAYER}input_layernorm.weight"
    checkpoint.tensors[norm] = base[norm].with_values(np.divide(base[norm].floats, inputs))
    for own in ("q", "k"):
        module = f"{LAYER}self_attn.{own}_proj"
        in_int4(checkpoint, module, base_weight(module) * inputs)
    in_int4(checkpoint, V_PROJ, np.divide(base_weight(V_PROJ) * inputs, values[:, None]))
    per_query = np.repeat(values.reshape(2, 1, 64), 2, axis=1).reshape(-1)
    in_int4(checkpoint, O_PROJ, base_weight(O_PROJ) * per_query)


def base_weight(module: str) -> Floats:
    tensor = base_tensors()[f"{module}.weight"]
    return tensor.floats.reshape(tensor.shape)


def errors(checkpoint: Path) -> list[Finding]:
    return [f for f in audit(checkpoint, BASE, deep=True) if f.severity == "error"]


@pytest.fixture
def moved(tmp_path: Path) -> RawCheckpoint:
    """A checkpoint of which one layer was smoothed."""
    checkpoint = RawCheckpoint(ROOT / "build" / "tiny-llama-w8a8", tmp_path / "moved")
    smoothed(checkpoint)
    return checkpoint


def test_rotated_weights_are_not_compared_and_a_warning_says_so(moved: RawCheckpoint) -> None:
    """None of them is the base's, nor is a norm or the embedding."""
    moved.exchange(GATE, UP)
    moved.quantization(transform_config={"config_groups": {"R1": {"type": "hadamard"}}})
    moved.write()
    assert errors(moved.directory) == []
    warnings = {f.rule for f in audit(moved.directory, BASE, deep=True) if f.severity == "warning"}
    assert warnings >= {"format-unknown", "weights-not-compared"}


def test_smoothing_that_is_undone_is_no_fault(moved: RawCheckpoint) -> None:
    moved.write()
    assert errors(moved.directory) == []


def test_values_that_are_undone_for_each_head_of_queries_are_no_fault(tmp_path: Path) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / "tiny-llama-w4a16", tmp_path / "moved")
    awq_of_attention(checkpoint)
    checkpoint.write()
    assert errors(checkpoint.directory) == []
    scale = f"{O_PROJ}.weight_scale"
    checkpoint.tensors[scale] = checkpoint.tensors[scale].times(1.05)
    checkpoint.write()
    assert scale in [finding.name for finding in errors(checkpoint.directory)]


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[RawCheckpoint], object]:
    return lambda c: c.tensors.update({name: change(c.tensors[name])})


@pytest.mark.parametrize(
    ("named", "damage"),
    [
        (f"{GATE}.weight", put(NORM, lambda _: base_tensors()[NORM])),
        (NORM, put(NORM, lambda t: t.times(1.01))),
        (NORM, put(NORM, lambda t: t.with_value(7, 1.2 * float(t.floats[7])))),
        (f"{DOWN}.weight", lambda c: quantized(c, UP, base_weight(UP))),
        (GATE, lambda c: c.exchange(GATE, UP)),
        (f"{DOWN}.weight_scale", put(f"{DOWN}.weight_scale", lambda t: t.times(1.02))),
    ],
    ids=[
        "norm lost",
        "norm x 1.01",
        "a channel of the norm",
        "rows not divided",
        "exchanged",
        "scale x 1.02",
    ],
)
def test_smoothing_that_is_not_undone_is_named(
    named: str, damage: Callable[[RawCheckpoint], object], moved: RawCheckpoint
) -> None:
    damage(moved)
    moved.write()
    found = errors(moved.directory)
    assert any(finding.name == named for finding in found), found


@made_by_llmcompressor
@pytest.mark.parametrize("name", MADE)
def test_checkpoints_of_llm_compressor_break_no_rule(name: str) -> None:
    """GPTQ, AWQ and SmoothQuant among them; `tools/make_llmcompressor.py` makes them."""
    assert errors(ROOT / LLMCOMPRESSOR / name) == []


@made_by_llmcompressor
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    ("damaged", "change"),
    [
        (GATE, lambda c: c.exchange(GATE, UP)),
        (
            "model.norm.weight",
            lambda c: c.tensors.update(
                {"model.norm.weight": c.tensors["model.norm.weight"].times(1.01)}
            ),
        ),
    ],
)
def test_what_llm_compressor_made_and_was_damaged_is_named(
    name: str, damaged: str, change: Callable[[RawCheckpoint], object], tmp_path: Path
) -> None:
    checkpoint = RawCheckpoint(ROOT / LLMCOMPRESSOR / name, tmp_path / "damaged")
    change(checkpoint)
    checkpoint.write()
    assert any(finding.name == damaged for finding in errors(checkpoint.directory))

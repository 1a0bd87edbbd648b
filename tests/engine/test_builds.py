"""What builds of vLLM compute differently is asked of the one that is installed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantgate.errors import BadInput
from quantgate.formats import activations, builds
from quantgate.formats.groups import group_of
from quantgate.formats.linear import read_linear
from quantgate.formats.stored import StoredTensors
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.parameters import dequantizer
from quantgate.subject.checkpoint_file import read_checkpoint_file
from quantgate.subject.files import read_config
from quantgate.subject.probe import stored_probe

ANSWERS = (
    builds.narrowing, builds.int8_rule_name, builds.symmetric_rule_name, builds.fp8_rule_name
)  # fmt: skip


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for answer in ANSWERS:
        answer.cache_clear()
    yield
    for answer in ANSWERS:
        answer.cache_clear()


def made_up_operator(rule: builds.Int8Rule) -> Callable[..., Any]:
    def scaled_int8_quant(x: torch.Tensor, *_: Any, symmetric: bool) -> Any:
        x = x.float()
        lowest = x.amin(dim=1, keepdim=True)
        scale = (x.amax(dim=1, keepdim=True) - lowest) / 255
        zero_point = (-128 - lowest / scale).round()
        return rule(x, scale, zero_point).clamp(-128, 127).char(), scale, zero_point.int()

    return scaled_int8_quant


@pytest.mark.parametrize("name", builds.INT8_RULES)
def test_every_rule_for_int8_inputs_is_told_from_the_others(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import _custom_ops

    rule = builds.INT8_RULES[name]
    monkeypatch.setattr(_custom_ops, "scaled_int8_quant", made_up_operator(rule))
    assert builds.int8_rule_name() == name
    assert builds.int8_rule() is rule


def test_a_rule_that_is_not_known_is_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    up = made_up_operator(lambda x, scale, zero: (x / scale + zero).ceil())
    monkeypatch.setattr(_custom_ops, "scaled_int8_quant", up)
    assert builds.arithmetic()["int8"] == "unknown"
    with pytest.raises(ValueError, match="follows none of the rules"):
        activations.int8_per_token(torch.randn(2, 8), symmetric=False)
    assert builds.symmetric_rule_name() == "unknown"
    with pytest.raises(ValueError, match=r"none of the rules .* without a zero point"):
        activations.int8_per_token(torch.randn(2, 8), symmetric=True)


@pytest.mark.parametrize("name", ["tiny-llama-w8a8", "tiny-llama-w8a8-asym"])
def test_what_has_no_known_rule_is_refused_with_its_layer(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for question in ("int8_rule_name", "symmetric_rule_name"):
        monkeypatch.setattr(builds, question, lambda: builds.UNKNOWN)
    directory = root / "build" / name
    quantization = read_config(directory)["quantization_config"]
    layer = "model.layers.0.mlp.down_proj"
    group = group_of(layer, "Linear", quantization)
    assert group is not None
    with pytest.raises(BadInput, match=rf"{name}: {layer}: .* follows none of the rules"):
        read_linear(StoredTensors(directory), layer, group, dequantizer("own"))


def symmetric_operator(rule: builds.SymmetricRule) -> Callable[..., Any]:
    def scaled_int8_quant(x: torch.Tensor, scale: Any, _: Any, *, symmetric: bool) -> Any:
        x = x.float()
        largest = x.abs().amax(dim=1, keepdim=True)
        codes = rule.dynamic(x, largest) if scale is None else rule.static(x, scale)
        return codes.clamp(-128, 127).char(), largest / 127, None

    return scaled_int8_quant


CPUS, CUDAS = builds.SYMMETRIC_RULES.values()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (CPUS, "product with the scale's reciprocal"),
        (CUDAS, "product with 127 over the largest, static quotient"),
        (builds.SymmetricRule(CPUS.dynamic, CUDAS.static), "unknown"),
        (builds.SymmetricRule(CUDAS.dynamic, CPUS.static), "unknown"),
    ],
)
def test_both_questions_to_a_build_tell_its_symmetric_rule(
    rule: builds.SymmetricRule, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import _custom_ops

    monkeypatch.setattr(_custom_ops, "scaled_int8_quant", symmetric_operator(rule))
    assert builds.symmetric_rule_name() == expected


def test_cudas_scale_is_a_quotient_of_one_rounding() -> None:
    """torch computes a number over a tensor as a product with its reciprocal, rounded twice."""
    largest = torch.linspace(0.5, 4.0, 4096)[:, None]
    quotient = torch.from_numpy(np.float32(127) / largest.numpy())
    assert not torch.equal(127 / largest, quotient)
    # With 2^k for x, the product with the quotient is exact, and its integer part in view.
    x = torch.full_like(largest, 2.0**16)
    assert torch.equal(CUDAS.dynamic(x, largest), (x * quotient).round())


@pytest.mark.parametrize("name", [*builds.FP8_RULES, "unknown"])
def test_a_gpus_rule_for_fp8_inputs_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops

    def scaled_fp8_quant(x: torch.Tensor, *, use_per_token_if_dynamic: bool) -> Any:
        x = x.float()
        scale = x.abs().amax(dim=1, keepdim=True) / torch.tensor(448.0)
        rule: builds.Fp8Rule = builds.FP8_RULES.get(name, lambda x, scale: x / scale * 1.01)
        return rule(x, scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(builds, "_operators", lambda: None)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", scaled_fp8_quant)
    assert builds.fp8_rule_name() == name
    if name == "unknown":
        monkeypatch.setattr(builds, "fp8_rule_name", lambda: name)
        with pytest.raises(ValueError, match="scaled_fp8_quant follows none of the rules known"):
            builds.fp8_rule()


def test_the_installed_build_follows_a_known_rule() -> None:
    assert builds.symmetric_rule_name() in builds.SYMMETRIC_RULES
    assert builds.int8_rule_name() in builds.INT8_RULES
    assert builds.arithmetic()["bfloat16"] in ("rounds", "truncates")


def test_the_reference_rounds_as_the_build_does(root: Path) -> None:
    """Its error in bfloat16 is nearer to the engine's own than the other way's.

    How far two roundings that have little in common correlate is chance.
    """
    checkpoint = read_checkpoint_file(
        root / "fixtures" / "checkpoints" / "tiny-reward-qwen2-w4a16.toml", root
    )
    lab = Lab(stored_probe, Ledger(lambda _: None))
    case = Case.of(checkpoint, "serving", lab)
    exact = case.exact.values
    engine = (case.engine.values - exact).ravel()
    own = builds.narrowing()
    narrowings: tuple[builds.Narrowing, ...] = ("rounds", "truncates")
    errors = {name: (case.rounded(name).values - exact).ravel() for name in narrowings}
    apart = {name: float(np.square(engine - error).mean()) for name, error in errors.items()}
    assert min(apart, key=lambda name: apart[name]) == own, apart
    if own == "truncates":  # a bias that both have
        assert np.corrcoef(engine, errors[own])[0, 1] > 0.8

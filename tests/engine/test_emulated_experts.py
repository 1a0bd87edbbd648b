"""Emulated experts: their values, their weights in each format, and what a replay says of them."""

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.kernels.linear  # noqa: F401  before its layers, as when it serves
from hypothesis import given, settings
from hypothesis import strategies as st

from architecture_runs import SETTINGS, Run
from quantgate.formats.activations import fp8_per_token, int8_per_token
from quantgate.formats.weights import dequantize_weight
from quantgate.measuring import engine
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.experts import compute_experts, is_experts, is_router
from random_architectures import ARCHITECTURES
from random_models import make, quantize
from tiny.quantizing import quantize_linear, scheme_of
from tiny.recipes import Group

int8_inputs = functools.partial(int8_per_token, symmetric=True)
QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.Tensor.float,
    "int8": int8_inputs,
    "fp8": fp8_per_token,
}


def silu_and_mul(values: torch.Tensor) -> torch.Tensor:
    gate, up = values.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# Values ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 9),
    count=st.integers(2, 6),
    chosen=st.integers(1, 2),
    width=st.sampled_from([4, 8, 12]),
    biased=st.booleans(),
    elsewhere=st.booleans(),
    quantizer=st.sampled_from(sorted(QUANTIZERS)),
    seed=st.integers(0, 2**16),
)
def test_emulated_experts_are_a_plain_loop_over_tokens(
    tokens: int,
    count: int,
    chosen: int,
    width: int,
    biased: bool,
    elsewhere: bool,
    quantizer: str,
    seed: int,
) -> None:
    """With experts that none reaches, biases, and experts of another rank, which add nothing."""
    from quantgate.patches.emulated_experts import (
        Products,
        Routing,
        Rule,
        Stacked,
        sum_of_experts,
    )

    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    hidden = 8
    x = random(tokens, hidden)
    ids = torch.stack([torch.randperm(count, generator=draw)[:chosen] for _ in range(tokens)])
    weights = random(tokens, chosen).softmax(dim=1)
    gate_up, down = random(count, 2 * width, hidden), random(count, hidden, width)
    biases = (random(count, 2 * width), random(count, hidden)) if biased else (None, None)
    places = torch.arange(count)
    if elsewhere:
        places[0] = -1
    quantize = QUANTIZERS[quantizer]

    expected = torch.zeros(tokens, hidden)
    for token in range(tokens):
        for slot in range(chosen):
            expert = int(ids[token, slot])
            if places[expert] < 0:
                continue
            first = gate_up[expert] @ quantize(x[token][None])[0]
            first = first if biases[0] is None else first + biases[0][expert]
            second = down[expert] @ quantize(silu_and_mul(first)[None])[0]
            second = second if biases[1] is None else second + biases[1][expert]
            expected[token] += weights[token, slot] * second

    products = Products()
    found = sum_of_experts(
        x,
        Routing(ids, weights),
        Stacked((gate_up, biases[0]), (down, biases[1]), places if elsewhere else None),
        Rule(quantize, silu_and_mul),
        products,
    )
    # A quantized code may flip where two sums differ in their last bits: a step of 1/127 or 1/16.
    near = 1e-5 if quantizer == "none" else 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=near * float(expected.abs().max() + 1))
    if products.seen:
        weighed = (products.seen["down"] * weights[..., None]).sum(dim=1)
        torch.testing.assert_close(found, weighed, rtol=1e-5, atol=1e-5)


# The stubs are vLLM's methods, as far as dequantizing reads them.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "W4A16": ("CompressedTensorsWNA16MoEMethod", {"num_bits": 4}),
    "W4A16_ASYM": ("CompressedTensorsWNA16MoEMethod", {"num_bits": 4}),
    "W8A16": ("CompressedTensorsWNA16MoEMethod", {"num_bits": 8}),
    "W8A8": ("CompressedTensorsW8A8Int8MoEMethod", {}),
    "FP8_DYNAMIC": ("CompressedTensorsW8A8Fp8MoEMethod", {"weight_block_size": None}),
    "FP8_BLOCK": ("CompressedTensorsW8A8Fp8MoEMethod", {"weight_block_size": [128, 128]}),
    "NVFP4A16": ("CompressedTensorsW4A4Nvfp4MoEMethod", {}),
    "MXFP4A16": ("CompressedTensorsW4A4Mxfp4MoEMethod", {}),
}


@pytest.mark.parametrize("preset", STOCK)
def test_an_experts_weight_is_dequantized_by_its_format(preset: str) -> None:
    """As the reference dequantizes a linear's, which reads the same tensors by code of its own."""
    from compressed_tensors.quantization.utils import generate_gparam
    from vllm.scalar_type import scalar_types

    from quantgate.patches.emulated_experts import FORMATS

    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(3))
    scheme = scheme_of(Group(preset))
    largest = weight.abs().max()
    overall = generate_gparam(-largest, largest) if preset.startswith("NVFP4") else None
    tensors = quantize_linear(weight, scheme, overall)
    expected = dequantize_weight(dict(tensors), scheme.weights.model_dump(mode="json"))
    method, settings_of = STOCK[preset]
    kinds = {
        (4, True): scalar_types.uint4b8,
        (4, False): scalar_types.uint4,
        (8, True): scalar_types.uint8b128,
    }
    kind = kinds.get((scheme.weights.num_bits, scheme.weights.symmetric))
    found = FORMATS[method].dequantize(tensors, SimpleNamespace(quant_type=kind, **settings_of))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_the_references_experts_quantize_the_inputs_of_both_products() -> None:
    """HF's own forward of the stacked experts, whose products are computed by rule."""
    import transformers

    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=3, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralExperts,
        MixtralSparseMoeBlock,
    )

    torch.manual_seed(0)
    module = MixtralExperts(config)
    stacks = [torch.nn.init.normal_(p).data for p in module.parameters()]
    x, ids = torch.randn(5, 16), torch.tensor([[0, 2], [2, 0], [0, 1], [1, 0], [2, 1]])
    weights = torch.rand(5, 2)
    compute_experts(module, int8_inputs, lambda *given: given[3](*given[:3], None))
    expected = torch.zeros(5, 16)
    for token in range(5):
        for slot in range(2):
            gate_up, down = (stack[ids[token, slot]] for stack in stacks)
            first = silu_and_mul(int8_inputs(x[token][None]) @ gate_up.T)
            expected[token] += weights[token, slot] * (int8_inputs(first) @ down.T)[0]
    torch.testing.assert_close(module(x, ids, weights), expected, rtol=1e-5, atol=1e-5)
    block = MixtralSparseMoeBlock(config)
    assert is_experts(module)
    # With 16-bit inputs, each product of float32 weights is rounded once, as a linear's is.
    halves = x.bfloat16(), ids, weights.bfloat16()
    compute_experts(module, None, lambda *given: given[3](*given[:3], None))
    rounded = torch.zeros(5, 16)
    for token in range(5):
        for slot in range(2):
            gate_up, down = (stack[ids[token, slot]] for stack in stacks)
            first = silu_and_mul((halves[0][token].float() @ gate_up.T).bfloat16())
            second = (first.float() @ down.T).bfloat16() * halves[2][token, slot]
            rounded[token] += second.float()
    found = module(*halves)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), rounded, rtol=2**-7, atol=2**-7)
    assert [is_router(m) for m in (block.gate, block.experts, torch.nn.Linear(4, 4))] == [
        True,
        False,
        False,
    ]


def test_a_compiled_model_calls_emulated_experts_without_tracing_them() -> None:
    """How many tokens each expert gets depends on the data, which no graph can hold."""
    from quantgate.patches.emulated_experts import _LAYERS, DequantizingExperts

    class Layer(torch.nn.Module):
        layer_name = "model.layers.0.mlp.experts"

        def __init__(self) -> None:
            super().__init__()
            self.quant_method = SimpleNamespace(compute=lambda _, x, weights, ids: x * ids.max())

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            method: Any = object.__new__(DequantizingExperts)
            return torch.relu(DequantizingExperts.apply(method, self, x, x, ids))

    layer, x = Layer(), torch.ones(3, 4)
    _LAYERS[layer.layer_name] = layer
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for most in (1, 2):
        torch.testing.assert_close(compiled(x, torch.tensor([0, most])), x * most)


# Engines -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small Mixtral, experts and all, in a preset."""
    root = tmp_path_factory.mktemp("mixtral")
    architecture = ARCHITECTURES["mixtral"]
    model: Any = make(architecture, root / "base")

    def find(preset: str) -> Path:
        quantize(model, root / "base", root / preset, preset, architecture.ignore)
        return root / preset

    return find


@pytest.mark.long
def test_an_engine_of_quantized_experts_agrees_and_an_experts_scale_that_is_off_is_named(
    quantized: Callable[[str], Path], tmp_path: Path
) -> None:
    row = Run("mixtral", "W4A16", quantized("W4A16"), "generate", tmp_path).row()
    assert row.fidelity.startswith("pass"), row
    assert row.replay.startswith("pass"), row
    assert row.fault == "caught: model.layers.1.block_sparse_moe.experts.0.w1", row
    assert "DequantizingExperts" in row.kernels.removeprefix("emulated: ")


def test_experts_that_are_not_emulated_are_refused_in_a_sentence(
    quantized: Callable[[str], Path],
) -> None:
    with (
        pytest.raises(EngineFailure) as caught,
        engine.running_engine(quantized("FP8"), settings=SETTINGS, dtype="float32"),
    ):
        pass
    assert str(caught.value).endswith(
        "has no kernel on this platform for the FP8 experts of MixtralForCausalLM, and quantgate "
        "does not emulate experts with static input scales; gate it where vLLM serves them, on a "
        "GPU."
    )

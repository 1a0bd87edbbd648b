"""Experts: what ranks saw of them, how they were chosen, and what a verdict says of that."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.formats.kernels import FORMATS_RULES, rules_of
from quantgate.judging.budget import OTHER_EXPERTS
from quantgate.judging.modules import modules_beyond, replayed
from quantgate.judging.routing import routing_of
from quantgate.judging.verdict import Verdict
from quantgate.measuring.captured_experts import joined
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.replay import Choice, ModuleError, Replay
from quantgate.subject.probe import Probe, Window

EXPERTS = "model.layers.1.mlp.experts"
# Three windows of 3, 4 and 2 tokens, of which 2, 3 and 1 are computed.
PROBE = Probe(
    "p", 9, tuple(Window(f"{n}", "prose", 1, tuple(range(n)), "") for n in (3, 4, 2)), "generate"
)
OWN = np.array([[[0, 1], [1, 0], [0, 1], [0, 1], [1, 0], [2, 0]]], np.int32)


def choice(differ: int = 0, weights: float = 1e-7, ids: list[list[int]] | None = None) -> Choice:
    chosen = np.array(ids or [[1, 0], [0, 1], [2, 0]], np.int32)
    return Choice(EXPERTS, 300, differ, weights, chosen, 4)


def replay_of(*choices: Choice, windows: tuple[int, ...] = (0, 2)) -> Replay:
    modules = (ModuleError("layers.0.q", "layers.0.q", 1e-7, 1e-7),)
    values = np.full(6, -1.0, np.float32)
    return Replay(modules, values, values, choices, windows)


def measured(experts: np.ndarray | None = None, dtype: str = "float32") -> Measurement:
    provenance = Provenance("engine", "cpu", "cpu", dtype)
    values = np.full(6, -1.0, np.float32)
    return Measurement(values, np.zeros(6, np.int32), provenance, experts=experts)


def judged(found: Replay, dtype: str = "float32") -> Verdict:
    return replayed(measured(dtype=dtype), found, PROBE, rounding=lambda: np.zeros(6))


# Choices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (choice(differ=4), "4 of 300 tokens have other experts"),
        (choice(weights=2e-5), "weights off by 2e-05"),
        (choice(weights=float("nan")), "weights off by nan"),
    ],
)
def test_a_choice_of_other_experts_fails_replay_and_its_layer_is_named(
    found: Choice, said: str
) -> None:
    verdict = judged(replay_of(found))
    assert verdict.outcome == "fail"
    (line,) = verdict.evidence
    assert line.startswith(f"routing    {EXPERTS}: ")
    assert said in line
    assert modules_beyond(measured(), replay_of(found)) == [line]


def test_a_choice_within_rounding_passes_and_16_bits_are_not_judged_by_it() -> None:
    few = choice(differ=int(OTHER_EXPERTS * 300))
    verdict = judged(replay_of(few))
    assert verdict.outcome == "pass"
    assert "3 of 300 choices of experts differ from the reference's" in verdict.detail
    assert judged(replay_of(choice(differ=300, weights=0.5)), "bfloat16").outcome == "pass"
    assert "experts" not in judged(replay_of()).detail


def test_shares_and_unreached_experts_are_said() -> None:
    """The engine's of windows 0 and 2, in any order; token 0 is the only one that differs."""
    found = replay_of(choice(ids=[[2, 1], [0, 1], [0, 2]]))
    base = OWN.copy()
    base[0, 5] = [1, 3]
    routed = routing_of(found, PROBE, measured(OWN), measured(base))
    assert "33.33% differ from the free-running reference's and 66.67% from the base's" in (
        routed.sentence
    )
    assert f"; NO token of the probe reaches {EXPERTS}.3, so nothing" in routed.sentence
    assert routed.lines == (f"routing    {EXPERTS}: tokens of the probe by expert: 6, 5, 1, 0",)
    every = OWN.copy()
    every[0, 1] = [3, 1]
    assert "each expert is reached by 1 tokens or more" in (
        routing_of(found, PROBE, measured(every)).sentence
    )


def test_a_dense_model_and_another_base_are_no_trouble() -> None:
    assert routing_of(replay_of(), PROBE, measured()).sentence == ""
    other = np.zeros((2, 6, 1), np.int32)
    said = routing_of(replay_of(choice()), PROBE, measured(OWN), measured(other)).sentence
    assert "the base has other experts" in said


# Ranks -------------------------------------------------------------------------------------------


@given(ranks=st.integers(1, 3), tokens=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_ranks_saw_of_experts_is_what_one_would_have_seen(
    ranks: int, tokens: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(-9, 9, shape, generator=draw).float()

    x, ids, weights = random(tokens, 4), random(tokens, 2).int(), random(tokens, 2)
    gate, up, activated = (random(tokens, 2, 6 * ranks) for _ in range(3))
    down, output = ([random(tokens, 2, 4) for _ in range(ranks)] for _ in range(2))
    seen = [
        {
            "x": x,
            "ids": ids,
            "weights": weights,
            "output": output[rank],
            "gate_up": torch.cat([gate.chunk(ranks, 2)[rank], up.chunk(ranks, 2)[rank]], 2),
            "activated": activated.chunk(ranks, 2)[rank],
            "down": down[rank],
        }
        for rank in range(ranks)
    ]
    whole = joined(seen)
    assert torch.equal(whole.products["gate_up"], torch.cat([gate, up], 2))
    assert torch.equal(whole.products["activated"], activated)
    assert torch.equal(whole.products["down"], sum(down[1:], start=down[0]))
    assert torch.equal(whole.output, sum(output[1:], start=output[0]))
    slots, at = torch.where(ids.T == ids[0, 0])
    assert torch.equal(whole.of_expert(int(ids[0, 0]), "activated"), activated[at, slots])


# Kernels -----------------------------------------------------------------------------------------


def test_vllms_own_experts_with_quantized_inputs_are_not_judged() -> None:
    with pytest.raises(BadInput, match="CompressedTensorsW8A8Fp8MoEMethod: the reference has no"):
        rules_of(["CompressedTensorsW8A8Fp8MoEMethod"])
    assert rules_of(["CompressedTensorsWNA16MoEMethod", "DequantizingExperts"]) == FORMATS_RULES

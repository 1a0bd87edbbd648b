"""How a build narrows float32 to bfloat16, told from made-up operators."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantgate.formats import builds


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    for answer in (builds.narrowing, builds.int8_rule_name, builds.symmetric_rule_name):
        answer.cache_clear()
    yield
    for answer in (builds.narrowing, builds.int8_rule_name, builds.symmetric_rule_name):
        answer.cache_clear()


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40))
def test_truncation_goes_towards_zero_by_less_than_a_unit_in_the_last_place(
    values: list[float],
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    cut = builds.truncate_to_bfloat16(x).float()
    assert bool((cut.abs() <= x.abs()).all())
    # bfloat16 has 8 significant bits; 2^-133 is its smallest subnormal number.
    assert bool(((x - cut).abs() <= x.abs() * 2.0**-7 + 2.0**-133).all())
    assert torch.equal(builds.truncate_to_bfloat16(cut), cut.bfloat16())


@pytest.mark.parametrize(
    ("narrow", "answer"),
    [
        (lambda x: x.float().bfloat16(), "rounds"),
        (lambda x: builds.truncate_to_bfloat16(x.float()), "truncates"),
    ],
)
@pytest.mark.parametrize("twice", [False, True], ids=["once", "SiLU first, as on CUDA"])
def test_how_a_build_narrows_is_seen(
    narrow: Callable[[torch.Tensor], torch.Tensor],
    answer: str,
    twice: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
        gate, up = x.double().chunk(2, dim=-1)
        activated = torch.nn.functional.silu(gate)
        out.copy_(narrow((narrow(activated).double() if twice else activated) * up))

    made_up = SimpleNamespace(silu_and_mul=silu_and_mul)
    monkeypatch.setattr(builds, "_operators", lambda: made_up)
    assert builds.narrowing() == answer

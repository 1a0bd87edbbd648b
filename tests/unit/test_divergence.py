"""Divergence: exact, never negative, and llama.cpp's statistics by their published definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_logits import sides

from quantgate.judging.llama_cpp import Estimate, llama_cpp_statistics
from quantgate.measuring import divergence as dv
from quantgate.measuring.divergence import Divergence, Side, divergence, kl_divergence


def exact(base: Side, other: Side) -> np.ndarray:
    """KL in float64, of the same float32 logits."""
    p, q = (
        side.logits(torch.from_numpy(side.hidden)).double().log_softmax(-1).numpy()
        for side in (base, other)
    )
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


@pytest.mark.parametrize("moved", [1e-5, 1e-3, 0.1, 3.0])
def test_it_is_the_float64_computations(moved: float) -> None:
    base, other, targets = sides(200, 64, 5000, moved)
    found = divergence(base, other, targets)
    np.testing.assert_allclose(found.kld, exact(base, other), atol=1e-5, rtol=1e-4)
    assert found.kld.min() > 0


@given(
    st.integers(1, 40), st.integers(1, 16), st.integers(2, 300), st.floats(0, 4), st.integers(0, 99)
)
@settings(deadline=None, max_examples=60)
def test_it_is_never_negative(
    rows: int, width: int, vocabulary: int, moved: float, seed: int
) -> None:
    base, other, targets = sides(rows, width, vocabulary, moved, seed)
    found = divergence(base, other, targets)
    assert np.all(found.kld >= 0)
    assert np.all(np.isfinite(found.kld))
    np.testing.assert_allclose(found.kld, exact(base, other), atol=1e-4, rtol=1e-3)


def test_a_model_and_itself_do_not_diverge_at_all() -> None:
    base, _, targets = sides(300, 64, 5000, 0.0)
    found = divergence(base, base, targets)
    assert np.all(found.kld == 0.0)
    assert np.all(found.same_top)
    statistics = llama_cpp_statistics(found)
    assert statistics["Mean KLD"] == Estimate(0.0, 0.0)
    assert statistics["Mean ln(PPL(Q)/PPL(base))"].value == 0.0
    assert statistics["Same top p"] == Estimate(1.0, 0.0)


def test_what_is_impossible_for_one_side_does_not_break_it() -> None:
    p = torch.tensor([[0.0, -math.inf, -200.0]]).log_softmax(-1)
    q = torch.tensor([[0.0, 0.0, 0.0]]).log_softmax(-1)
    assert kl_divergence(p, q).item() == pytest.approx(math.log(3))


def test_memory_is_bounded_by_chunks_and_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, other, targets = sides(257, 32, 1000, 0.2)
    whole = divergence(base, other, targets)
    most: list[int] = []

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        most.append(len(hidden))
        return base.logits(hidden)

    monkeypatch.setattr(dv, "CHUNK_BYTES", 16 * 4 * 1000)
    chunked = divergence(Side(base.hidden, watched, 1000), other, targets)
    assert max(most) == 16
    assert sum(most) == 257
    np.testing.assert_allclose(chunked.kld, whole.kld, atol=1e-6)
    assert chunked.same_top.tolist() == whole.same_top.tolist()


@given(
    vocabulary=st.integers(2, 40),
    extra=st.integers(-38, 38),
    rows=st.integers(1, 9),
    pad_logit=st.sampled_from([-30.0, 0.0, 3.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_a_longer_vocabulary_is_compared_over_what_both_have(
    vocabulary: int, extra: int, rows: int, pad_logit: float, seed: int
) -> None:
    """What a padded checkpoint gives its further tokens is lost: KL over all, by definition."""
    base, other, targets = sides(rows, 8, vocabulary, 0.3, seed)
    common = max(1, vocabulary + min(0, extra))
    targets %= common
    more = np.float32(pad_logit)

    def padded(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(base.logits(hidden), (0, max(0, extra)), value=float(more))

    if extra >= 0:  # the checkpoint is padded
        found = divergence(base, Side(other.hidden, padded, vocabulary + extra), targets)
        q = padded(torch.from_numpy(other.hidden)).double().log_softmax(-1)[:, :vocabulary].numpy()
    else:  # the base has more
        few = Side(other.hidden, lambda h: other.logits(h)[:, :common], common)
        found = divergence(base, few, targets)
        q = few.logits(torch.from_numpy(few.hidden)).double().log_softmax(-1).numpy()
    p = base.logits(torch.from_numpy(base.hidden))[:, :common].double().log_softmax(-1).numpy()
    expected = (np.exp(p) * (p - q[:, :common])).sum(axis=1)
    np.testing.assert_allclose(found.kld, expected, atol=1e-4, rtol=1e-3)
    np.testing.assert_allclose(
        found.logprob, np.take_along_axis(q, targets[:, None], axis=1)[:, 0], atol=1e-4, rtol=1e-4
    )
    assert found.extra == (extra if extra >= 0 else common - vocabulary)


@pytest.mark.parametrize("wrong", ["rows", "vocabulary", "nothing"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    base, other, targets = sides(5, 4, 10, 0.1)
    if wrong == "vocabulary":
        other, targets = sides(5, 4, 11, 0.1)[1], np.arange(6, 11)
    count = {"rows": 4, "nothing": 0}.get(wrong, 5)
    with pytest.raises(
        ValueError, match=r"targets\.$|token 10 of the text is in one vocabulary only"
    ):
        divergence(base, other, targets[:count])


def llama_cpp(found: Divergence) -> dict[str, float]:
    """The same numbers by the loops of llama.cpp's definitions: sums, sums of squares, products."""
    n = len(found.kld)

    def mean_and_uncertainty(total: float, squares: float) -> tuple[float, float]:
        mean = total / n
        variance = squares / n - mean * mean
        return mean, math.sqrt(variance / (n - 1)) if variance > 0 else 0.0

    def percentile(values: list[float], fraction: float) -> float:
        place = fraction * (n - 1)
        low = int(place)
        part = place - low
        return (1 - part) * values[low] + part * values[min(low + 1, n - 1)]

    nll, base = (-found.logprob).tolist(), (-found.logprob_base).tolist()
    q, q_error = mean_and_uncertainty(sum(nll), sum(x * x for x in nll))
    b, b_error = mean_and_uncertainty(sum(base), sum(x * x for x in base))
    products = sum(x * y for x, y in zip(nll, base, strict=True))
    covariance = (products / n - q * b) / (n - 1)
    ratio_error = math.sqrt(q_error**2 + b_error**2 - 2 * covariance)
    kld, kld_error = mean_and_uncertainty(sum(found.kld), sum(x * x for x in found.kld))
    dp = [math.exp(-x) - math.exp(-y) for x, y in zip(nll, base, strict=True)]
    mse, mse_error = mean_and_uncertainty(sum(x**2 for x in dp), sum(x**4 for x in dp))
    same = sum(found.same_top.tolist()) / n
    ordered, moved = sorted(found.kld.tolist()), sorted(dp)
    return {
        "Mean PPL(Q)": math.exp(q), "Mean PPL(Q) ±": math.exp(q) * q_error,
        "Mean PPL(base)": math.exp(b), "Mean PPL(base) ±": math.exp(b) * b_error,
        "Cor(ln(PPL(Q)), ln(PPL(base)))": covariance / (q_error * b_error),
        "Mean ln(PPL(Q)/PPL(base))": q - b, "Mean ln(PPL(Q)/PPL(base)) ±": ratio_error,
        "Mean PPL(Q)/PPL(base)": math.exp(q - b),
        "Mean PPL(Q)/PPL(base) ±": math.exp(q - b) * ratio_error,
        "Mean PPL(Q)-PPL(base)": math.exp(q) - math.exp(b),
        "Mean PPL(Q)-PPL(base) ±": math.sqrt(
            (math.exp(q) * q_error) ** 2 + (math.exp(b) * b_error) ** 2
            - 2 * math.exp(q) * math.exp(b) * covariance
        ),
        "Mean KLD": kld, "Mean KLD ±": kld_error, "Maximum KLD": ordered[-1],
        "99.9% KLD": percentile(ordered, 0.999), "99.0% KLD": percentile(ordered, 0.99),
        "95.0% KLD": percentile(ordered, 0.95), "90.0% KLD": percentile(ordered, 0.9),
        "Median KLD": percentile(ordered, 0.5), "10.0% KLD": percentile(ordered, 0.1),
        "5.0% KLD": percentile(ordered, 0.05), "1.0% KLD": percentile(ordered, 0.01),
        "0.1% KLD": percentile(ordered, 0.001), "Minimum KLD": ordered[0],
        "Mean Δp": sum(dp) / n, "Mean Δp ±": mean_and_uncertainty(sum(dp), mse * n)[1],
        "Maximum Δp": moved[-1], "75.0% Δp": percentile(moved, 0.75),
        "Median Δp": percentile(moved, 0.5), "25.0% Δp": percentile(moved, 0.25),
        "0.1% Δp": percentile(moved, 0.001), "Minimum Δp": moved[0],
        "RMS Δp": math.sqrt(mse), "RMS Δp ±": 0.5 / math.sqrt(mse) * mse_error,
        "Same top p": same, "Same top p ±": math.sqrt(same * (1 - same) / (n - 1)),
    }  # fmt: skip


@pytest.mark.parametrize("moved", [0.01, 0.3])
def test_the_statistics_are_llama_cpps(moved: float) -> None:
    base, other, targets = sides(1500, 64, 500, moved)
    found = divergence(base, other, targets)
    ours = llama_cpp_statistics(found)
    for name, expected in llama_cpp(found).items():
        estimate = ours[name.removesuffix(" ±")]
        value = estimate.error if name.endswith(" ±") else estimate.value
        assert value == pytest.approx(expected, abs=1e-6), name


@given(st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None)
def test_hidden_states_are_stored_in_their_own_bits(dtype: str, rows: int, seed: int) -> None:
    """16-bit ones in half the bytes of float32, and not one bit is lost."""
    from quantgate.measuring.codec import packed, unpacked

    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 33, generator=generator) * 100
    states[0, 0] = 0.0
    hidden = states.to(getattr(torch, dtype)).float().numpy()
    stored = packed(hidden)
    assert stored.nbytes == hidden.nbytes // (1 if dtype == "float32" else 2)
    assert unpacked(stored).tobytes() == hidden.tobytes()

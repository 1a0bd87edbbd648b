"""Both model runners, beside each other, against HF; V2 needs Triton, here its interpreter.

No stock `prompt_logprobs` here: where vLLM takes Triton for usable, V1's hang on a CPU.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from harness import dear_calls, dear_runner_property
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from quantgate.measuring.engine import running_engine
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import Probe

LIMIT = 1e-5  # what the gate allows float32 scores (budget.FP32_MAX)


@pytest.fixture(scope="module", params=[("1", 64), ("1", 1024), ("0", 64)])
def llm(request: pytest.FixtureRequest, root: Any) -> Iterator[Any]:
    """V2 with short and with long chunks, and V1."""
    v2, chunk = request.param
    settings = EngineSettings(enforce_eager=True, max_model_len=1024, max_num_batched_tokens=chunk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", v2)
        model = root / "fixtures" / "tiny" / "llama"
        with running_engine(model, settings=settings, dtype="float32", max_num_seqs=8) as llm:
            assert llm.llm_engine.vllm_config.use_v2_model_runner == (v2 == "1")
            yield llm


@given(
    chosen=st.lists(
        st.tuples(st.integers(0, 41), st.integers(1, 200), st.booleans()), min_size=1, max_size=8
    ),
    start=st.integers(0, 100),
)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_scores_are_hfs_on_both_runners(
    llm: Any,
    large_probe: Probe,
    hf_scores: list[NDArray[np.float64]],
    chosen: list[tuple[int, int, bool]],
    start: int,
) -> None:
    """Any mix of prompts, some of them generating, some scored from a row on."""
    from vllm import SamplingParams

    prompts, params = [], []
    for index, length, generates in chosen:
        ids = list(large_probe.windows[index].ids[:length])
        prompts.append({"prompt_token_ids": ids})
        params.append(
            SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
            if generates
            else SamplingParams(score_mode=True, score_start=min(start, len(ids) - 1))
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for (index, _, generates), asked, output in zip(chosen, params, outputs, strict=True):
        ids = output.prompt_token_ids
        if generates:
            assert len(output.outputs[0].token_ids) == 3
            assert output.prompt_logprobs is None
            continue
        found = output.prompt_logprobs.logprobs.astype(np.float64)
        hf = hf_scores[index][asked.score_start : len(ids) - 1]
        assert len(found) == len(hf)
        assert np.abs(found - hf).max(initial=0.0) <= LIMIT


def test_several_targets_and_hidden_states_come_back_on_both_runners(
    llm: Any, large_probe: Probe
) -> None:
    from vllm import SamplingParams

    ids = list(large_probe.windows[0].ids[:150])
    targets = np.random.default_rng(1).integers(0, 1024, (149, 3))
    targets[::2, 2] = -1
    prompt = {"prompt_token_ids": ids, "target_token_ids": targets}
    params = SamplingParams(score_mode=True, score_hidden_states=True)
    # With one that has a single target a row, in the same batch.
    first, second = llm.generate(
        [prompt, {"prompt_token_ids": ids}],
        [params, SamplingParams(score_mode=True)],
        use_tqdm=False,
    )
    scores = first.prompt_logprobs
    weight = llm.apply_model(lambda model: model.lm_head.weight.double().numpy())[0][:1024]
    logits = scores.hidden_states.astype(np.float64) @ weight.T
    logprob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    own = np.take_along_axis(logprob, targets % 1024, axis=1)
    np.testing.assert_allclose(scores.logprobs, np.where(targets >= 0, own, -np.inf), atol=1e-5)
    np.testing.assert_array_equal(scores.top1, logits.argmax(axis=1))
    np.testing.assert_allclose(scores.top1_logprobs, logprob.max(axis=1), atol=1e-5)
    following = logprob[np.arange(149), ids[1:]]
    np.testing.assert_allclose(second.prompt_logprobs.logprobs, following, atol=1e-5)


def test_an_aborted_request_leaves_the_runner_clean(llm: Any, large_probe: Probe) -> None:
    from vllm import SamplingParams

    engine, ids = llm.llm_engine, list(large_probe.windows[0].ids)
    engine.add_request("gone", {"prompt_token_ids": ids}, SamplingParams(score_mode=True))
    engine.step()
    engine.abort_request(["gone"])
    (output,) = llm.generate(
        [{"prompt_token_ids": ids}], SamplingParams(score_mode=True), use_tqdm=False
    )
    assert len(output.prompt_logprobs.logprobs) == len(ids) - 1


def test_the_benchmarks_native_mode_gives_what_score_mode_does(
    llm: Any, large_probe: Probe
) -> None:
    from gpu.score_modes import vllm_modes

    prompts = [{"prompt_token_ids": list(window.ids[:100])} for window in large_probe.windows[:3]]
    modes: Any = vllm_modes(llm, prompts)
    if not llm.llm_engine.vllm_config.use_v2_model_runner:
        assert "native" not in modes
        return
    for native, ours in zip(modes["native"](), modes["score"](), strict=True):
        rows = np.asarray(native.prompt_token_id_logprobs)
        np.testing.assert_allclose(rows[:, 0], ours.prompt_logprobs.logprobs, atol=LIMIT)


def test_a_scoring_request_searches_and_reads_nothing(llm: Any, large_probe: Probe) -> None:
    """Where it enters the engine: the interpreter, which scores, inspects what it runs."""
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": list(large_probe.windows[0].ids[:40])}

    def add(name: str) -> None:
        llm.llm_engine.add_request(name, prompt, SamplingParams(score_mode=True))

    add("first")
    with dear_runner_property():
        assert dear_calls(lambda: llm.llm_engine.vllm_config.use_v2_model_runner)
        assert not dear_calls(lambda: add("second"))
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()

"""The same scores in every engine setting, and HF's: chunking, batching, caching, preemption."""

from collections.abc import Iterator
from pathlib import Path
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

pytestmark = pytest.mark.long

# What the gate allows float32 scores (budget.FP32_MAX).

ENGINES: dict[str, dict[str, Any]] = {
    "one-step": {"max_num_batched_tokens": 4096, "max_num_seqs": 64},
    "chunks-of-33": {"max_num_batched_tokens": 33, "max_num_seqs": 4},
    "one-at-a-time": {"max_num_batched_tokens": 64, "max_num_seqs": 1},
    "no-cache": {"max_num_batched_tokens": 256, "enable_prefix_caching": False},
    # Nine blocks of 128 tokens: long requests evict one another while they are prefilled.
    "preempting": {"max_num_batched_tokens": 128, "num_gpu_blocks_override": 9},
}


@pytest.fixture(scope="module", params=ENGINES)
def llm(request: pytest.FixtureRequest, root: Path) -> Iterator[Any]:
    arguments = ENGINES[request.param]
    with running_engine(
        root / "fixtures" / "tiny" / "llama",
        settings=EngineSettings(enforce_eager=True, max_model_len=1024),
        dtype="float32",
        **arguments,
    ) as llm:
        yield llm


@given(
    chosen=st.lists(
        st.tuples(st.integers(0, 41), st.integers(1, 1024), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    start=st.integers(0, 200),
)
@settings(
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_scores_do_not_depend_on_how_the_engine_runs(
    llm: Any,
    large_probe: Probe,
    hf_scores: list[NDArray[np.float64]],
    hf_limit: float,
    chosen: list[tuple[int, int, bool]],
    start: int,
) -> None:
    """Any mix of prompts, in any order, some of them generating, some scored from a row on."""
    from vllm import SamplingParams

    prompts, params = [], []
    for index, length, generates in chosen:
        ids = list(large_probe.windows[index].ids[:length])
        first = min(start, len(ids) - 1)
        prompts.append({"prompt_token_ids": ids[:500] if generates else ids})
        params.append(
            SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, detokenize=False)
            if generates
            else SamplingParams(score_mode=True, score_start=first)
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for (index, _, generates), prompt, asked, output in zip(
        chosen, prompts, params, outputs, strict=True
    ):
        if generates:
            assert len(output.outputs[0].token_ids) == 8
            assert output.prompt_logprobs is None
            continue
        rows = len(prompt["prompt_token_ids"]) - 1
        scores = output.prompt_logprobs.logprobs.astype(np.float64)
        assert len(scores) == rows - asked.score_start
        hf = hf_scores[index][asked.score_start : rows]
        assert np.abs(scores - hf).max(initial=0.0) <= hf_limit


def test_an_aborted_request_leaves_the_others_alone(
    llm: Any, large_probe: Probe, hf_scores: list[NDArray[np.float64]], hf_limit: float
) -> None:
    from vllm import SamplingParams

    engine = llm.llm_engine
    longest = max(range(len(large_probe.windows)), key=lambda i: len(large_probe.windows[i].ids))
    for name, index in (("gone", longest), ("kept", 0)):
        ids = list(large_probe.windows[index].ids)
        engine.add_request(name, {"prompt_token_ids": ids}, SamplingParams(score_mode=True))
    outputs = list(engine.step())
    engine.abort_request(["gone"])
    while engine.has_unfinished_requests():
        outputs += engine.step()
    (kept,) = [output for output in outputs if output.request_id == "kept" and output.finished]
    scores = kept.prompt_logprobs.logprobs
    assert np.abs(scores - hf_scores[0]).max() <= hf_limit


def test_a_preempted_request_is_scored_whole(
    root: Path,
    large_probe: Probe,
    hf_scores: list[NDArray[np.float64]],
    hf_limit: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Generating requests that grow take the blocks of prompts that are being prefilled."""
    model = root / "fixtures" / "tiny" / "llama"
    arguments = {**ENGINES["preempting"], "max_model_len": 1024}
    with running_engine(
        model, settings=EngineSettings(enforce_eager=True), dtype="float32", **arguments
    ) as llm:
        from vllm import SamplingParams
        from vllm.v1.core.sched.scheduler import Scheduler

        preempted = []
        stock = Scheduler._preempt_request

        def counted(scheduler: Any, request: Any, *rest: Any, **options: Any) -> None:
            preempted.append(request.request_id)
            stock(scheduler, request, *rest, **options)

        monkeypatch.setattr(Scheduler, "_preempt_request", counted)
        ids = [list(window.ids) for window in large_probe.windows]
        generating = SamplingParams(max_tokens=300, ignore_eos=True, detokenize=False)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in [*(i[:250] for i in ids[:8]), *ids]],
            [generating] * 8 + [SamplingParams(score_mode=True)] * len(ids),
            use_tqdm=False,
        )
    assert preempted
    for output, hf in zip(outputs[8:], hf_scores, strict=True):
        assert np.abs(output.prompt_logprobs.logprobs - hf).max() <= hf_limit


def test_a_scoring_request_searches_and_reads_nothing(llm: Any, probe: Probe) -> None:
    """On CUDA one look at which runner an engine has takes 10 ms, more than to score a prompt."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(window.ids[:40])} for window in probe.windows[:3]]

    def score() -> None:
        for output in llm.generate(prompts, SamplingParams(score_mode=True), use_tqdm=False):
            assert len(output.prompt_logprobs.logprobs) == 39

    def generate() -> None:
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)

    score()  # an engine's first request looks at the engine
    with dear_runner_property():
        assert dear_calls(lambda: llm.llm_engine.vllm_config.use_v2_model_runner)
        # vLLM binds arguments by `inspect` itself, a few times for each step.
        assert dear_calls(score) <= dear_calls(generate)

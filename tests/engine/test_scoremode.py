"""Score mode on real engines: the seed's snippet as written, and the scores it returns."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import ENGINE_ENVIRONMENT

from quantgate.measuring.engine import running_engine
from quantgate.subject.checkpoint import EngineSettings

# The basic usage of the score-mode document, with the model's name and the text left to fill in.
BASIC_USAGE = """
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

# Load quantized model
llm = LLM(
    model={model!r},
    quantization="compressed-tensors"
)

# Tokenize
tokenizer = llm.get_tokenizer()
token_ids = tokenizer.encode("Your text here")

# Enable score mode
sampling_params = SamplingParams(
    score_mode=True,
    temperature=0.0
)

# Get exact logprobs for all prompt tokens
outputs = llm.generate(
    prompts=[TokensPrompt(prompt_token_ids=token_ids)],
    sampling_params=sampling_params
)

# Calculate perplexity
import math
output = outputs[0]
total_nll = sum(
    -output.prompt_logprobs[i][token_ids[i]].logprob
    for i in range(1, len(token_ids))
    if token_ids[i] in output.prompt_logprobs[i]
)
perplexity = math.exp(total_nll / (len(token_ids) - 1))
print(f"Perplexity: {{perplexity:.4f}}")
"""


# What the same document adds for `target_token_ids`.
OPTIMIZED_USAGE = """
# Prepare target tokens (skip position 0 which has no context)
target_token_ids = token_ids[1:]

# Use optimized path
outputs = llm.generate(
    prompts=[TokensPrompt(
        prompt_token_ids=token_ids,
        target_token_ids=target_token_ids  # Only extract these!
    )],
    sampling_params=sampling_params
)
assert (outputs[0].prompt_logprobs.logprobs == output.prompt_logprobs.logprobs).all()
assert outputs[0].prompt_token_ids == token_ids
"""


@pytest.mark.slow(reason="an engine that vLLM compiles, as by default")
def test_the_documented_usage_runs_as_written(quantized: Path) -> None:
    """In a plain script, with the engine in a process of its own, as vLLM has it by default."""
    usage = BASIC_USAGE.format(model=str(quantized)) + OPTIMIZED_USAGE
    script = f"import quantgate\n{usage}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Perplexity: ")]
    assert 1.0 < float(line.split()[1]) < 1e5


@pytest.fixture(scope="module")
def llm(root: Path) -> Iterator[Any]:
    """The unquantized tiny model in float32, prefilled in chunks of 64 tokens."""
    settings = EngineSettings(enforce_eager=True, max_num_batched_tokens=64, max_model_len=1024)
    with running_engine(root / "fixtures/tiny/llama", settings=settings, dtype="float32") as llm:
        yield llm


def prompts(lengths: list[int]) -> list[dict[str, list[int]]]:
    generator = np.random.default_rng(0)
    return [{"prompt_token_ids": generator.integers(6, 1024, n).tolist()} for n in lengths]


def test_scores_are_stock_vllms_in_every_chunking(llm: Any) -> None:
    """Long, short, two-token and one-token prompts, mixed with a generating request."""
    from vllm import SamplingParams

    batch = prompts([300, 17, 2, 1, 64, 65, 129])
    scoring = SamplingParams(score_mode=True, max_tokens=0)
    generating = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=0, detokenize=False)
    mixed = llm.generate(
        [*batch, *batch], [scoring] * len(batch) + [generating] * len(batch), use_tqdm=False
    )
    for prompt, scored, stock in zip(batch, mixed, mixed[len(batch) :], strict=False):
        ids = prompt["prompt_token_ids"]
        expected = [stock.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        scores = scored.prompt_logprobs
        np.testing.assert_allclose(scores.logprobs, expected, atol=1e-5, rtol=0)
        assert scores.logprobs.dtype == np.float32
        assert scores.token_ids.tolist() == ids[1:]
        ranks = [stock.prompt_logprobs[i][ids[i]].rank for i in range(1, len(ids))]
        assert (scores.top1 == scores.token_ids).tolist() == [rank == 1 for rank in ranks]
        assert (scored.outputs[0].token_ids, len(stock.outputs[0].token_ids)) == ([], 3)


def test_scores_read_like_vllms_own_list(llm: Any) -> None:
    from vllm import SamplingParams

    (prompt,) = prompts([5])
    (output,) = llm.generate([prompt], SamplingParams(score_mode=True), use_tqdm=False)
    scores, ids = output.prompt_logprobs, prompt["prompt_token_ids"]
    assert len(scores) == 5
    assert scores[0] is None
    assert [list(row) for row in scores[1:]] == [[i] for i in ids[1:]]
    assert scores[-1][ids[-1]].logprob == float(scores.logprobs[-1])
    assert list(scores) == scores[:]
    with pytest.raises(IndexError, match="prompt token 5 of a prompt of 5 tokens"):
        scores[5]
    json.dumps([scores[1][ids[1]].logprob])


def score(llm: Any, prompt: dict[str, Any], **settings: Any) -> Any:
    from vllm import SamplingParams

    (output,) = llm.generate([prompt], SamplingParams(score_mode=True, **settings), use_tqdm=False)
    assert output.prompt_token_ids == list(prompt["prompt_token_ids"])
    return output.prompt_logprobs


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200, 1024])
def test_a_prompt_of_any_length_is_scored_whole(llm: Any, length: int) -> None:
    """Up to and including max_model_len: scoring needs no room for a generated token."""
    (prompt,) = prompts([length])
    scores = score(llm, prompt)
    assert (len(scores), len(scores.logprobs)) == (length, length - 1)
    assert np.isfinite(scores.logprobs).all()
    alone = score(llm, {"prompt_token_ids": prompt["prompt_token_ids"][:40]}).logprobs
    np.testing.assert_allclose(scores.logprobs[: len(alone)], alone[: length - 1], atol=1e-5)


def test_several_targets_a_row_are_the_rows_own_log_softmax(llm: Any) -> None:
    (prompt,) = prompts([100])
    targets = np.random.default_rng(1).integers(0, 1024, (99, 3))
    targets[:, 0] = prompt["prompt_token_ids"][1:]
    targets[::2, 2] = -1
    scores = score(llm, {**prompt, "target_token_ids": targets.tolist()}, score_hidden_states=True)
    weight = llm.apply_model(lambda model: model.lm_head.weight.double().numpy())[0][:1024]
    logits = scores.hidden_states.astype(np.float64) @ weight.T
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(scores.top1, logits.argmax(axis=1))
    expected = np.where(targets >= 0, np.take_along_axis(expected, targets % 1024, 1), -np.inf)
    np.testing.assert_allclose(scores.logprobs, expected, atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, targets == logits.argmax(axis=1)[:, None])
    assert [len(row) for row in scores[1:5]] == [len(set(t) - {-1}) for t in targets[:4].tolist()]
    np.testing.assert_array_equal(scores.logprobs[:, 0], score(llm, prompt).logprobs)


@pytest.mark.parametrize("start", [0, 1, 63, 64, 150, 198, 199])
def test_scoring_from_a_row_on_gives_the_same_scores_from_the_cache(llm: Any, start: int) -> None:
    (prompt,) = prompts([200])
    whole, rest = score(llm, prompt), score(llm, prompt, score_start=start)
    np.testing.assert_allclose(rest.logprobs, whole.logprobs[start:], atol=1e-5, rtol=0)
    assert rest.token_ids.tolist() == prompt["prompt_token_ids"][start + 1 :]
    assert [row is None for row in rest] == [i <= start for i in range(200)]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ({"target_token_ids": [1, 2]}, {}, "target_token_ids has 2 rows, but .* has 3 scored rows"),
        ({"target_token_ids": [1, 2, 1024]}, {}, "contains 1024, outside the vocabulary of 1024"),
        ({"target_token_ids": [1, 2, -1]}, {}, "contains -1, outside the vocabulary of 1024"),
        ({"target_token_ids": [1.0, 2.0, 3.0]}, {}, "must be integers .* got float64"),
        ({"target_token_ids": ["a", "b", "c"]}, {}, "must be integers .* got <U1"),
        ({"target_token_ids": [[1], [2, 3], [4]]}, {}, "got a ragged list"),
        ({"prompt_token_ids": []}, {}, "prompt_token_ids must not be empty .* got \\[\\]"),
        ({}, {"score_start": 4}, "score_start must be in 0 … 3 .* got 4"),
    ],
)
def test_bad_input_is_a_value_error_and_the_engine_lives_on(
    llm: Any, prompt: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    good = {"prompt_token_ids": [0, 7, 8, 9]}
    with pytest.raises(ValueError, match=message):
        score(llm, {**good, **prompt}, **settings)
    assert len(score(llm, good).logprobs) == 3


def test_a_prompt_that_is_too_long_is_refused_by_vllm_itself(llm: Any) -> None:
    with pytest.raises(Exception, match="maximum context length is 1024"):
        score(llm, {"prompt_token_ids": [7] * 1025})


def test_the_cache_is_read_up_to_the_first_scored_row_and_no_further(llm: Any) -> None:
    from vllm import SamplingParams

    (prompt,) = prompts([400])
    score(llm, prompt)
    cached = []
    for start in (0, 15, 300):
        params = SamplingParams(score_mode=True, score_start=start)
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        cached.append(output.num_cached_tokens)
    block = llm.llm_engine.vllm_config.cache_config.block_size
    assert cached == [0, 15 // block * block, 300 // block * block]
    assert cached[2] > 0


def test_targets_without_score_mode_are_refused(llm: Any) -> None:
    from vllm import SamplingParams

    prompt = {"prompt_token_ids": [0, 7, 8], "target_token_ids": [7, 8]}
    with pytest.raises(ValueError, match="target_token_ids needs SamplingParams\\(score_mode=True"):
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n must be 1 with score_mode=True; got 2"),
        ({"prompt_logprobs": 5}, "prompt_logprobs must be 0, or 1 .*got 5"),
        ({"max_tokens": 5}, "max_tokens must be 0 .*got 5"),
        ({"score_start": -1}, "score_start must be .* at least 0; got -1"),
        ({"logprobs": 1}, "logprobs must be left out.*got 1"),
        ({"stop": ["x"]}, "stop must be left out.*got"),
    ],
)
def test_what_scoring_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    from vllm import SamplingParams

    with pytest.raises(ValueError, match=message):
        SamplingParams(score_mode=True, **arguments)


def test_max_tokens_0_is_for_scoring_only() -> None:
    from vllm import SamplingParams

    SamplingParams(score_mode=True, max_tokens=0)
    with pytest.raises(ValueError, match="max_tokens=0 is allowed with score_mode=True only"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize("shape", [(3, 1), (2, 2), (4, 2), (3, 5)])
def test_arrays_of_another_shape_than_asked_for_are_refused(shape: tuple[int, int]) -> None:
    """As vLLM's own prompt_logprobs are: an exception here would end a server's output loop."""
    import torch

    from quantgate.patches.scoremode.outputs import PromptScores
    from quantgate.patches.scoremode.request import make_score_request

    scores = PromptScores(make_score_request([1, 2, 3, 4], None, start=0, vocab_size=9), [1, 2, 3])
    tokens = torch.zeros(shape, dtype=torch.int32)
    scores.receive(SimpleNamespace(logprobs=torch.zeros(shape), logprob_token_ids=tokens))
    with pytest.raises(
        ValueError, match=r"does not support vLLM .*: 3 rows of 2 values were asked"
    ):
        scores.logprobs  # noqa: B018

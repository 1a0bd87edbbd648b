"""Score mode on real engines: the seed's snippet as written, and the scores it returns."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.checkpoint import EngineSettings
from quantgate.engine import ENVIRONMENT, running_engine

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


def test_the_basic_usage_runs_as_written(quantized: Path) -> None:
    """In a plain script, with the engine in a process of its own, as vLLM has it by default."""
    script = "import quantgate\n" + BASIC_USAGE.format(model=str(quantized))
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Perplexity: ")]
    assert 1.0 < float(line.split()[1]) < 1e5


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, **ENVIRONMENT}


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 2}, "n must be 1 with score_mode=True, got 2"),
        ({"prompt_logprobs": 5}, "prompt_logprobs must be left out.*got 5"),
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


def test_importing_quantgate_is_light() -> None:
    script = (
        "import time; start = time.perf_counter(); import quantgate, sys\n"
        "heavy = {'torch', 'vllm', 'transformers', 'scipy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

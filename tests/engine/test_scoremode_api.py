"""Every way into score mode but `LLM.generate`: copies, wire formats, AsyncLLM, the HTTP server."""

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ENGINE_ENVIRONMENT, post, running_server

from quantgate.patches.scoremode.request import SCORE_KEY

pytestmark = pytest.mark.long

IDS = [0, 7, 8, 9, 100, 7, 8]


def test_from_optional_takes_score_modes_fields() -> None:
    from vllm import SamplingParams

    params = SamplingParams.from_optional(score_mode=True, max_tokens=0, score_start=3, seed=5)
    assert params == SamplingParams(score_mode=True, max_tokens=0, score_start=3, seed=5)
    assert isinstance(params, SamplingParams)
    with pytest.raises(ValueError, match="n must be 1 with score_mode=True; got 2"):
        SamplingParams.from_optional(score_mode=True, n=2)
    with pytest.raises(ValueError, match="max_tokens=0 is allowed with score_mode=True only"):
        SamplingParams.from_optional(max_tokens=0)


@pytest.mark.parametrize("way", ["clone", "copy", "deepcopy", "pickle", "msgpack"])
def test_a_copy_scores_like_the_original(way: str) -> None:
    import msgspec
    from vllm import SamplingParams

    params = SamplingParams(score_mode=True, max_tokens=0, score_start=2, score_hidden_states=True)
    params.extra_args = {SCORE_KEY: {"targets": b"\1\0\0\0", "start": 2}}
    copies = {
        "clone": lambda: params.clone(),
        "copy": lambda: copy.copy(params),
        "deepcopy": lambda: copy.deepcopy(params),
        "pickle": lambda: pickle.loads(pickle.dumps(params)),
        "msgpack": lambda: msgspec.msgpack.decode(
            msgspec.msgpack.encode(params), type=SamplingParams
        ),
    }
    again = copies[way]()
    assert again == params
    assert (again.score_mode, again.score_start, again.score_hidden_states) == (True, 2, True)
    assert again.extra_args == params.extra_args


def test_beam_search_is_refused_by_name() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(ValueError, match=r"score_mode must be .* beam search.*got True"):
        BeamSearchParams(beam_width=2, max_tokens=4, score_mode=True)
    with pytest.raises(ValueError, match=r"score_mode must be .* beam search.*got True"):
        SamplingParams(score_mode=True).beam_width  # noqa: B018  # what LLM.beam_search reads first
    assert not hasattr(SamplingParams(), "beam_width")
    assert BeamSearchParams(beam_width=2, max_tokens=4).beam_width == 2


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"score_mode": "maybe"}, "score_mode must be true or false; got 'maybe'"),
        ({"score_mode": 1, "score_start": "x"}, "score_start must be an integer .* got 'x'"),
        ({"score_mode": 1, "score_hidden_states": 1}, "score_hidden_states is not for vllm_xargs"),
    ],
)
def test_bad_request_arguments_are_refused(xargs: dict[str, Any], message: str) -> None:
    from vllm import SamplingParams

    with pytest.raises(ValueError, match=message):
        SamplingParams.from_optional(extra_args=xargs)


@pytest.mark.parametrize("off", [0, False, "false", "False", 0.0])
def test_score_mode_can_be_switched_off_in_a_request(off: object) -> None:
    from vllm import SamplingParams

    params = SamplingParams.from_optional(extra_args={"score_mode": off}, max_tokens=5)
    assert (params.score_mode, params.max_tokens, params.prompt_logprobs) == (False, 5, None)


def test_async_llm_scores_like_llm(root: Path) -> None:
    """With the engine in a process of its own, several requests at a time, one of them bad."""
    script = f"""
import asyncio, json, sys
import quantgate
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

async def main():
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model={str(root / "fixtures/tiny/llama")!r}, dtype="float32", max_model_len=256,
        enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True))
    async def score(name, ids, **fields):
        params = SamplingParams(score_mode=True, max_tokens=0, **fields)
        async for output in engine.generate({{"prompt_token_ids": ids}}, params, name):
            last = output
        return last.prompt_logprobs
    try:
        ids = {IDS}
        results = await asyncio.gather(
            score("a", ids), score("b", ids, score_start=3), score("c", ids, score_start=99),
            return_exceptions=True)
        print(json.dumps([
            results[0].logprobs.tolist(), results[1].logprobs.tolist(),
            [isinstance(results[2], ValueError), str(results[2])]]))
    finally:
        engine.shutdown()

asyncio.run(main())
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**ENGINE_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    whole, rest, error = json.loads(result.stdout.splitlines()[-1])
    np.testing.assert_allclose(whole, expected_scores(root), atol=1e-5, rtol=0)
    np.testing.assert_allclose(rest, expected_scores(root)[3:], atol=1e-5, rtol=0)
    assert error[0]
    assert "score_start must be in 0 … 6" in error[1]


def expected_scores(root: Path) -> Any:
    """HF's own, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "fixtures/tiny/llama", dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0]
    return logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's OpenAI server with the plugin; its address."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(
        root / "fixtures/tiny/llama", log, "--served-model-name=tiny", "--max-model-len=256"
    ) as address:
        yield address


def complete(server: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    """Post a completion request; return the status and the answer."""
    return post(server, "/v1/completions", **{"model": "tiny", "prompt": IDS, **fields})


def test_a_completion_request_scores_through_vllm_xargs(server: str, root: Path) -> None:
    status, answer = complete(server, max_tokens=0, vllm_xargs={"score_mode": True})
    assert status == 200, answer
    (choice,) = answer["choices"]
    rows = choice["prompt_logprobs"]
    scores = [rows[i][str(IDS[i])]["logprob"] for i in range(1, len(IDS))]
    assert (len(rows), rows[0], choice["text"]) == (len(IDS), None, "")
    np.testing.assert_allclose(scores, expected_scores(root), atol=1e-5, rtol=0)
    assert answer["usage"] == {
        **answer["usage"],
        "prompt_tokens": len(IDS),
        "completion_tokens": 0,
        "total_tokens": len(IDS),
    }


def test_openais_echo_gives_the_same_scores(server: str, root: Path) -> None:
    """What lm-eval's `local-completions` sends and reads, in score mode and on stock vLLM."""
    echo = {"echo": True, "max_tokens": 0, "logprobs": 1}
    _, stock = complete(server, **echo)
    status, answer = complete(server, **echo, vllm_xargs={"score_mode": True})
    assert status == 200, answer
    (choice,), (other,) = answer["choices"], stock["choices"]
    assert choice["text"] == other["text"]
    ours, theirs = choice["logprobs"], other["logprobs"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["text_offset"] == theirs["text_offset"]
    assert ours["token_logprobs"][0] is None
    np.testing.assert_allclose(ours["token_logprobs"][1:], expected_scores(root), atol=1e-5, rtol=0)
    for mine, its in zip(ours["top_logprobs"][1:], theirs["top_logprobs"][1:], strict=True):
        assert mine.keys() == its.keys()
        np.testing.assert_allclose(list(mine.values()), [its[t] for t in mine], atol=1e-5, rtol=0)


def test_the_documented_request_is_answered(server: str, root: Path) -> None:
    text = (root / "docs" / "score-mode.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    status, answer = complete(server, **json.loads(block))
    assert status == 200, answer
    (choice,) = answer["choices"]
    assert choice["text"] == json.loads(block)["prompt"]
    assert all(score < 0 for score in choice["logprobs"]["token_logprobs"][1:])


def test_chosen_targets_and_a_start_pass_through_a_request(server: str) -> None:
    fields = {"score_mode": 1, "score_start": 4, "target_token_ids": [11, 12]}
    status, answer = complete(server, max_tokens=0, vllm_xargs=fields)
    assert status == 200, answer
    rows = answer["choices"][0]["prompt_logprobs"]
    assert [row and list(row) for row in rows] == [None] * 5 + [["11"], ["12"]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vllm_xargs": {"score_mode": "maybe"}}, "score_mode must be true or false; got 'maybe'"),
        (
            {"vllm_xargs": {"score_mode": 1, "target_token_ids": [1]}},
            "target_token_ids has 1 rows, but a prompt of 7 tokens has 6",
        ),
        ({"vllm_xargs": {"score_mode": 1}, "n": 2}, "n must be 1 with score_mode=True; got 2"),
        (
            {"vllm_xargs": {"score_mode": 1}, "use_beam_search": True, "n": 2, "max_tokens": 4},
            "score_mode must be left out with beam search",
        ),
        (
            {"vllm_xargs": {"score_mode": 1, "target_token_ids": [1] * 6}, "logprobs": 1},
            "target_token_ids cannot be combined with logprobs",
        ),
    ],
)
def test_a_bad_request_is_answered_and_the_server_lives_on(
    server: str, fields: dict[str, Any], message: str
) -> None:
    status, answer = complete(server, **{"max_tokens": 0, **fields})
    assert status == 400, answer
    assert message in answer["error"]["message"]
    assert complete(server, max_tokens=0, vllm_xargs={"score_mode": True})[0] == 200


def test_a_request_that_does_not_score_is_vllms_own(server: str) -> None:
    status, answer = complete(server, max_tokens=3, temperature=0)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["prompt_logprobs"] is None

"""Score mode's requests and answers, without an engine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest


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


@pytest.mark.parametrize("sent", [1, "x", {}, {"targets": "x"}, {"as_list": True}])
def test_a_client_cannot_make_a_request_a_scoring_one(sent: object) -> None:
    """Over HTTP it chooses the extra arguments, which reach the engine core."""
    from quantgate.patches.scoremode.request import SCORE_KEY, is_score_request

    assert not is_score_request(SimpleNamespace(extra_args={SCORE_KEY: sent}))


def test_importing_quantgate_is_light() -> None:
    script = (
        "import time; start = time.perf_counter(); import quantgate, sys\n"
        "heavy = {'torch', 'vllm', 'transformers', 'scipy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

"""Score mode's requests and answers, without an engine."""

import subprocess
import sys
from types import SimpleNamespace

import pytest


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

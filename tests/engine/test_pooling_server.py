"""`/pooling` of vLLM's server gives what `LLM.encode` gives, with the plugin in every process."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import post, running_server

from quantgate.measuring.engine import running_engine
from quantgate.measuring.pooling import encode, pooling_arguments
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import embedded_probe
from quantgate.subject.task import POOLING, Task

pytestmark = pytest.mark.long

# float32 sums of the same terms, in batches of other sizes.
SAME = 1e-5


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("tiny-prm-native-w4a16", "token_reward"),
        pytest.param(
            "tiny-colbert-bert-w4a16",
            "token_embed",
            marks=pytest.mark.slow(reason="another server; one task is asked in every run"),
        ),
    ],
)
def test_the_server_gives_what_encode_gives(
    root: Path, tmp_path: Path, name: str, task: Task
) -> None:
    from vllm import PoolingParams

    model = root / "build" / name
    prompts = [list(window.ids) for window in embedded_probe(root, task).windows[:5]]
    arguments = pooling_arguments(model, task)
    expected = {}
    with running_engine(
        model, settings=EngineSettings(enforce_eager=True), dtype="float32", **arguments
    ) as llm:
        for activated in (False, True):
            params = PoolingParams(use_activation=activated)
            expected[activated] = encode(llm, task, prompts, params)
    options = ["--runner=pooling", f"--pooler-config={json.dumps(arguments['pooler_config'])}"]
    with running_server(model, tmp_path / "log", *options) as server:
        common: dict[str, Any] = {
            "model": str(model), "task": POOLING[task].task, "encoding_format": "float",
        }  # fmt: skip
        for activated, rows in expected.items():
            status, answer = post(
                server, "/pooling", **common, input=prompts, use_activation=activated
            )
            assert status == 200, answer
            found = [item["data"] for item in answer["data"]]
            assert [len(item) for item in found] == [len(ids) for ids in prompts]
            for ours, theirs in zip(found, rows, strict=True):
                np.testing.assert_allclose(ours, theirs, atol=SAME, rtol=0)
        status, answer = post(server, "/pooling", **common, input=[[3] * 5000])
        assert status == 400
        assert "maximum context length is" in answer["error"]["message"]

"""The first spelling of token tasks, `LLM(task=…)`, and today's, in a user's own script."""

import json
from pathlib import Path

import pytest
from harness import ENGINE_ENVIRONMENT
from preloaded import run_python

from quantgate.patches.pooling_api import token_task_options
from quantgate.subject.task import Task

NER = "build/tiny-ner-bert-w4a16"
PRM = "build/tiny-prm-native-fp8-dynamic"

SCRIPT = """
import json, quantgate, torch
from vllm import LLM

def answer(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error)]

llm = LLM(
    model="MODEL",
    task="TASK",
    model_config={"num_labels": LABELS},  # Specify the number of labels for your task
    dtype="float32",
    enforce_eager=True,
)
text = "The quick brown fox jumps over the lazy dog."
outputs = llm.encode(text)
token_logits = outputs[0].data
token_probs = torch.nn.functional.softmax(torch.as_tensor(token_logits), dim=-1)
encode = lambda prompt: llm.encode(prompt, use_tqdm=False)
print("RESULT" + json.dumps({
    "logits": token_logits.tolist(),
    "probabilities": token_probs.tolist(),
    "ids": outputs[0].prompt_token_ids,
    "empty": answer(lambda: encode(["fine", ""])),
    "no ids": answer(lambda: encode({"prompt_token_ids": []})),
    "too long": answer(lambda: encode("word " * 3000)),
}))
del llm
today = LLM(
    model="MODEL", runner="pooling", dtype="float32", enforce_eager=True,
    pooler_config={"task": "token_classify", "tok_pooling_type": "ALL"},
)
found = today.encode(text, pooling_task="token_classify")[0].outputs.data
print("TODAY" + json.dumps(found.tolist()))
"""


@pytest.mark.parametrize(
    ("model", "task", "labels"), [(NER, "token_classification", 6), (PRM, "token_reward", 2)]
)
def test_the_first_spelling_gives_logits(root: Path, model: str, task: str, labels: int) -> None:
    import numpy as np

    from quantgate.judging.budget import FP32_MAX_RAW, ROUNDING_FACTOR
    from quantgate.measuring import reference
    from quantgate.measuring.measurement import largest_difference
    from quantgate.subject.probe import Probe, Window

    script = SCRIPT.replace("MODEL", str(root / model)).replace("TASK", task)
    script = script.replace("LABELS", str(labels))
    result = run_python("-c", script, cwd=root, env=ENGINE_ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    found = json.loads(next(line[6:] for line in lines if line.startswith("RESULT")))
    today = json.loads(next(line[5:] for line in lines if line.startswith("TODAY")))
    assert np.shape(found["logits"]) == (len(found["ids"]), labels)
    np.testing.assert_allclose(found["probabilities"], today, atol=1e-3 if "fp8" in model else 1e-5)
    window = Window("d", "s", 0, tuple(found["ids"]), "")
    kind: Task = "token_classify" if task == "token_classification" else "token_reward"
    probe = Probe("p", 1024, (window,), kind)
    expected, exact = (
        reference.measure(root / model, probe, dtype=dtype, announce=lambda _: None)
        for dtype in ("float32", "float64")
    )
    error = np.abs(np.array(found["logits"]) - expected.values)
    # As fidelity-float32 judges: this text's logits, of up to 13, are moved by 2.0e-5 where HF
    # computes them in float64, on a processor with AVX2, and vLLM rounds as often as HF.
    rounding = ROUNDING_FACTOR * largest_difference(exact, expected)
    limit = max(FP32_MAX_RAW, rounding)
    assert error.max() <= limit if "w4a16" in model else error.mean() <= 1e-2
    assert found["empty"] == ["ValueError", "prompt 1 is empty; there is no token in it to label."]
    assert found["no ids"][1] == "prompt 0 is empty; there is no token in it to label."
    assert "maximum context length is" in found["too long"][1]
    assert "\n" not in found["too long"][1]


@pytest.mark.parametrize(
    ("model", "task", "settings", "message"),
    [
        (NER, "token_classification", {"num_labels": 3}, r"num_labels is 3, but .* 6 labels \(O, "),
        (
            PRM,
            "token_reward",
            {"num_labels": 5},
            r"num_labels is 5, but the checkpoint has 2 labels",
        ),
        (
            NER,
            "token_classification",
            {"labels": 6},
            "model_config takes num_labels only, got labels",
        ),
        (NER, "reward", {}, "task='reward' is not one of token_classification, token_reward"),
        ("fixtures/tiny/llama", "token_reward", {}, "a LlamaForCausalLM has no head for labels"),
        ("no-such-model", "token_reward", {}, "its config.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    root: Path, model: str, task: str, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        token_task_options(root / model, task, settings)
    assert "\n" not in str(caught.value)


def test_vllm_refuses_a_quantized_head_by_name(root: Path, tmp_path: Path) -> None:
    """As it is loaded, not at the first request."""
    import shutil

    directory = Path(shutil.copytree(root / "build" / "tiny-ner-qwen2-fp8-dynamic", tmp_path / "x"))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = []
    path.write_text(json.dumps(config))
    from quantgate.measuring.engine import running_engine
    from quantgate.measuring.engine_failure import EngineFailure
    from quantgate.measuring.pooling import pooling_arguments
    from quantgate.subject.checkpoint import EngineSettings

    with (
        pytest.raises(EngineFailure, match="the head 'score' is quantized") as caught,
        running_engine(
            directory, settings=EngineSettings(enforce_eager=True), dtype="float32",
            **pooling_arguments(directory, "token_classify"),
        ),
    ):  # fmt: skip
        pass
    assert "\n" not in str(caught.value)

"""The scripts that label and reward tokens: what they print, and what they say of bad input."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from harness import ENGINE_ENVIRONMENT
from preloaded import run_python

from quantgate.commands.token_table import label_texts, show
from quantgate.errors import BadInput

NER = "build/tiny-ner-bert-w4a16"


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    return run_python(*shlex.split(command), cwd=root, env=ENGINE_ENVIRONMENT)


def test_the_documented_commands_run(root: Path) -> None:
    text = (root / "docs" / "pooling.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    python (tools/token_\w+\.py .*)$", text, re.MULTILINE)
    assert len(commands) == 2
    readable = run(root, commands[0])
    assert readable.returncode == 0, readable.stderr[-2000:]
    assert re.search(r"^well +PERSON +0\.99\d\d$", readable.stdout, re.MULTILINE)
    assert "emulated kernels: Dequantizing" in readable.stdout or "emulated" not in readable.stdout
    printed = run(root, commands[1])
    assert printed.returncode == 0, printed.stderr[-2000:]
    found = json.loads(printed.stdout)
    assert found["labels"] == ["wrong", "right"]
    (tokens,) = found["texts"]
    assert all(len(token["logits"]) == 2 for token in tokens)
    assert all(0.5 <= token["probability"] <= 1 for token in tokens)


def test_a_table_has_a_row_for_each_token(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In float32 the probabilities are those of a softmax over the logits."""
    import numpy as np

    texts = ["On 2 July 1928 Taswell told Minding.", "\x1b[31m[bold]x"]
    found = label_texts(str(root / NER), "token_classification", 6, texts, "float32")
    for token in found.texts[0]:
        exponentials = np.exp(np.array(token.logits) - max(token.logits))
        assert token.probability == pytest.approx(max(exponentials) / sum(exponentials), rel=1e-5)
        assert token.label == found.labels[int(np.argmax(token.logits))]
    assert {"DATE", "PERSON"} <= {token.label for token in found.texts[0]}
    show(found)
    printed = capsys.readouterr().out
    assert "\x1b[31m" not in printed
    assert "emulated kernels: DequantizingLinearKernel" in printed
    rows = re.findall(r" [01]\.\d{4}$", printed, re.MULTILINE)
    assert len(rows) == sum(map(len, found.texts))


@pytest.mark.parametrize(
    ("model", "labels", "text", "message"),
    [
        (NER, 3, "x", r"num_labels is 3, but the checkpoint has 6 labels"),
        (NER, 6, "", r"--text number 1 is empty"),
        (
            NER,
            6,
            "word " * 2000,
            r"--text number 1 has \d+ tokens, but the model takes at most 1024",
        ),
        ("fixtures/tiny/llama", None, "x", r"a LlamaForCausalLM has no head for labels"),
        ("no-such-model", None, "x", r"its config.json cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    root: Path, model: str, labels: int | None, text: str, message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        label_texts(str(root / model), "token_classification", labels, [text], "float32")
    assert "\n" not in str(caught.value)


def test_a_script_says_it_without_a_traceback(root: Path) -> None:
    result = run(root, f"tools/token_reward.py --model {NER} --num-labels 9 --text x")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: build/tiny-ner-bert-w4a16: num_labels")
    assert "Traceback" not in result.stderr

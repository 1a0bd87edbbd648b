"""The scripts that label and reward tokens, run as a user would."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from harness import ENGINE_ENVIRONMENT
from preloaded import run_python

NER = "build/tiny-ner-bert-w4a16"


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    return run_python(*shlex.split(command), cwd=root, env=ENGINE_ENVIRONMENT)


@pytest.mark.slow(reason="starts an engine for each documented command")
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


def test_a_script_says_it_without_a_traceback(root: Path) -> None:
    result = run(root, f"tools/token_reward.py --model {NER} --num-labels 9 --text x")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: build/tiny-ner-bert-w4a16: num_labels")
    assert "Traceback" not in result.stderr

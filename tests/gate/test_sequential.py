"""The tools that measure quality on as much text as it takes."""

import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import run_python


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "tiny-lama"], "error: tiny-lama: neither a directory"),
        (["--checkpoint", "tiny-ner-bert-w8a8"], "its task is 'token_classify'"),
        (["--checkpoint", "build/tiny-llama-w4a16"], "no base is named; give --base"),
        (["--checkpoint", "tiny-llama-w4a16", "--text-file", "no.txt"], "No such file"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, arguments: list[str], message: str) -> None:
    result = subprocess.run(
        [sys.executable, "tools/sequential_quality.py", *arguments],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_few_clean_reruns_raise_no_alarm(root: Path) -> None:
    """Small; `python tools/rerun_clean.py --runs 200` is what docs/statistics.md reports."""
    result = run_python(
        "tools/rerun_clean.py", "--runs", "4", "--checkpoint", "tiny-llama-w4a16",
        "--checkpoint", "tiny-llama-w8a8", "--checkpoint", "tiny-ner-qwen2-fp8-dynamic", cwd=root,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1].startswith("4 reruns, ")
    assert result.stdout.splitlines()[-1].endswith(" pass")

"""tools/perplexity.py: what it prints, and what it refuses."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from preloaded import run_python


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    """The embedded probe's documents, one after another."""
    lines = (root / "fixtures" / "probes" / "tiny.jsonl").read_text().splitlines()
    return "\n\n".join(json.loads(line).get("text", "") for line in lines)[:12000]


def run_tool(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        "tools/perplexity.py", *arguments, cwd=root, env={"HF_HUB_OFFLINE": "1", **os.environ}
    )


def test_the_tool_says_what_it_scored(root: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text)
    result = run_tool(
        root,
        *("--model", "build/tiny-llama-w4a16", "--text-file", str(tmp_path / "text.txt")),
        *("--protocol", "llama.cpp", "--context-length", "128", "--quantization"),
        *("compressed-tensors", "--enforce-eager", "--json", str(tmp_path / "out.json")),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert result.stdout.splitlines()[0] == (
        "protocol llama.cpp: chunks of 128 tokens, the first replaced by BOS, "
        "tokens 65 … 127 of each scored"
    )
    assert (
        f"perplexity {report['perplexity']:.4f} ± {report['standard_error']:.4f}" in result.stdout
    )
    assert f"scored {report['tokens']:,} tokens" in result.stdout
    assert report["tokens"] == 63 * report["windows"]
    assert "tokens/s" in result.stdout
    assert ("emulated kernels: " in result.stdout) == bool(report["emulated"])
    assert "tokens scored" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--dataset", "wikitext", "--dataset-config", "wikitext-2-raw-v1"],
            "data set wikitext/wikitext-2-raw-v1, split test: not in the cache",
        ),
        (["--text", "a b", "--stride", "4", "--protocol", "exl3"], "--stride is for --protocol"),
        (["--text", "a b", "--stride", "2048"], "--stride must be in 1 … 2047"),
        (["--text", "a b", "--context-length", "1"], "--context-length must be at least 2, got 1"),
        (["--text-file", "nowhere.txt"], "--text-file nowhere.txt: no such file"),
        (["--text", "a", "--model", "no-where"], "no-where: neither a directory, nor a hub id"),
        (["--text", "a", "--model", "no/where"], "no/where: no tokenizer to be had"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    root: Path, arguments: list[str], message: str
) -> None:
    result = run_tool(root, "--model", "build/tiny-llama-w4a16", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1

"""Quality on as much text as it takes: it stops when it is clear, on the right side."""

import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import run_python

from quantgate.commands.sequential import CHARACTERS, Progress, probe_of_text, quality_until_clear
from quantgate.errors import BadInput
from quantgate.measuring.sources import Sources
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe


@pytest.fixture(scope="module")
def sources(large_probe: Probe) -> Sources:
    """Sources that serve the base once for all margins."""
    return Sources(lambda _task, _quality: large_probe, lambda _: None)


@pytest.mark.parametrize(
    ("margin", "outcome"), [(0.0722, "pass"), (-0.05, "fail"), (0.0028, "inconclusive")]
)
def test_it_stops_when_it_is_clear_and_not_before(
    root: Path, sources: Sources, large_probe: Probe, margin: float, outcome: str
) -> None:
    """The embedded W4A16 costs about 0.0031 nat a token."""
    checkpoint = read_checkpoint_files(root)["tiny-llama-w4a16"]
    seen: list[Progress] = list(quality_until_clear(sources, checkpoint, large_probe, margin))
    assert [progress.outcome for progress in seen[:-1]] == ["inconclusive"] * (len(seen) - 1)
    assert seen[-1].outcome == outcome
    assert seen[-1].documents == (len(large_probe.windows) if outcome == "inconclusive" else 32)
    assert seen[-1].lower < seen[-1].mean < seen[-1].upper


def test_text_becomes_windows_of_whole_lines(quantized: Path) -> None:
    lines = [f"line {i} " + "word " * 20 + "\n" for i in range(200)] + ["x" * 5000]
    text = "".join(lines)
    probe = probe_of_text([text, ""], quantized)
    assert "".join(window.text for window in probe.windows) == text
    assert max(len(window.text) for window in probe.windows) < 2 * CHARACTERS
    assert probe.windows[0].text.endswith("\n")
    assert len(set(probe.documents.tolist())) == len(probe.windows)
    with pytest.raises(BadInput, match="nothing to score"):
        probe_of_text([""], quantized)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "tiny-lama"], "error: --checkpoint tiny-lama: neither a directory"),
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

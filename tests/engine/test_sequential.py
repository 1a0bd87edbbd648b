"""Quality on as much text as it takes: it stops when it is clear, on the right side."""

from pathlib import Path

import pytest

from quantgate.commands.sequential import CHARACTERS, Progress, probe_of_text, quality_until_clear
from quantgate.errors import BadInput
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe


@pytest.fixture(scope="module")
def lab(large_probe: Probe) -> Lab:
    """It serves the base once for all margins."""
    return Lab(lambda *_: large_probe, Ledger(lambda _: None))


@pytest.mark.parametrize(
    ("margin", "outcome"), [(0.0722, "pass"), (-0.05, "fail"), (0.0028, "inconclusive")]
)
def test_it_stops_when_it_is_clear_and_not_before(
    root: Path, lab: Lab, large_probe: Probe, margin: float, outcome: str
) -> None:
    """The embedded W4A16 costs about 0.0031 nat a token."""
    case = Case.of(read_checkpoint_files(root)["tiny-llama-w4a16"], "serving", lab)
    seen: list[Progress] = list(quality_until_clear(case, large_probe, margin))
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

"""The command line: every command and option explains itself, and errors are one sentence."""

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantgate.__main__ import main, parse

VERBS = ("gate", "audit", "doctor", "budgets", "checks", "approve", "merge", "init", "card")


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_command_is_listed_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    listed = re.findall(r"^    ([a-z]+) {2,}\S", text, re.MULTILINE)
    assert set(VERBS) <= set(listed)
    assert "quantgate gate PATH --base BASE" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_says_what_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    shown: list[argparse.Action] = []
    add = argparse.HelpFormatter.add_argument

    def seen(formatter: argparse.HelpFormatter, action: argparse.Action) -> None:
        shown.append(action)
        add(formatter, action)

    monkeypatch.setattr(argparse.HelpFormatter, "add_argument", seen)
    text = helped(capsys, verb)
    assert shown
    assert [action.dest for action in shown if not action.help] == []
    assert len(text.split("\n\n")[1]) > 20  # what the command does


def test_words_after_two_dashes_are_pytests() -> None:
    given = parse(["gate", "a", "b", "--base", "c", "--", "-k", "x", "--", "--base"])
    assert (given.checkpoints, given.base) == (["a", "b"], "c")
    assert given.pytest == ["-k", "x", "--", "--base"]
    assert parse(["gate", "--", "-x"]).checkpoints == []


def test_other_commands_take_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["doctor", "--", "-x"])
    assert "only `gate` takes words after --, got -x" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate", "--project", "/nowhere"], "--project /nowhere: no such directory"),
        (["approve", "--all", "--reason", "r"], "no checkpoint file there, and only a checkpoint"),
        (["gate"], "nothing to judge; name a checkpoint"),
    ],
)
def test_an_error_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    for name in ("CI", "PYTEST_XDIST_WORKER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 4
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert message in said.err


def test_help_imports_no_engine() -> None:
    """A command line that is wrong says so at once."""
    code = (
        "import contextlib, sys; from quantgate.__main__ import parse\n"
        "with contextlib.suppress(SystemExit): parse(['gate', '--help'])\n"
        "assert not {'torch', 'vllm', 'transformers', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

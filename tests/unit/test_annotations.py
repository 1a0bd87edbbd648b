"""GitHub's annotations: where they point, and that a checkpoint's strings stay in their place."""

from pathlib import Path

import pytest

from quantgate.judging.results import CheckResult
from quantgate.judging.verdict import Outcome, Verdict
from quantgate.reporting.annotations import line_of, workflow_commands

FILE = """# a comment: source = "no"
source = "./x"
scheme = "W4A16"

[budget.quality]
margin = 0.05
reason = "small"

[[known_failure]]
check = 'replay-float32'
reason = "r"
issue = "i"
"""


@pytest.mark.parametrize(
    ("check", "line"),
    [
        ("fidelity-float32", 2),
        ("quality", 5),
        ("divergence-from-base", 5),
        ("drift-serving", 2),
        ("replay-float32", 10),
        ("replay-serving", 2),
    ],
)
def test_it_points_at_the_line_that_has_to_do_with_the_check(check: str, line: int) -> None:
    assert line_of(check, FILE) == line
    assert line_of(check, "") == 1


def result(outcome: Outcome, check: str = "quality", **verdict: str) -> CheckResult:
    return CheckResult("x", "W4A16", check, Verdict(outcome, "100% off", **verdict))  # type: ignore[arg-type]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "fixtures" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "x.toml").write_text(FILE)
    return tmp_path / "models"


def test_what_does_not_count_as_a_pass_has_one(project: Path) -> None:
    results = [
        result("pass"),
        result("fail", known_failure="known"),
        result("inconclusive"),
        result("not-run", "fidelity-float32", next_step="do this"),
    ]
    assert list(workflow_commands(results, project, project.parent)) == [
        "::error file=models/fixtures/checkpoints/x.toml,line=5,title=x quality%3A INCONCLUSIVE"
        "::100%25 off",
        "::error file=models/fixtures/checkpoints/x.toml,line=2,title=x fidelity-float32%3A NOT-RUN"
        "::100%25 off%0Anext: do this",
    ]


def test_its_file_may_be_in_a_folder_of_its_own(project: Path) -> None:
    folder = project / "fixtures" / "checkpoints"
    (folder / "x.toml").rename(folder / "y.toml")
    (folder / "real").mkdir()
    (folder / "real" / "x.toml").write_text(FILE)
    (line,) = workflow_commands([result("fail")], project, project)
    assert line.startswith("::error file=fixtures/checkpoints/real/x.toml,line=5,")


def test_a_checkpoint_without_a_file_has_no_place(tmp_path: Path) -> None:
    (line,) = workflow_commands([result("fail")], tmp_path, tmp_path)
    assert line == "::error title=x quality%3A FAIL::100%25 off"


def test_a_message_cannot_begin_a_command(tmp_path: Path) -> None:
    hostile = "a\r\n::add-mask::b,c:d%0A"
    failed = CheckResult("x", "s", hostile, Verdict("fail", hostile))
    (line,) = workflow_commands([failed], tmp_path, tmp_path)
    assert line.splitlines() == [line]
    properties = line.removeprefix("::error ").partition("::")[0]
    assert properties.count("=") == 1
    assert "%250A" in line

"""Documents name what exists: make targets, files, checks, and keys of checkpoint files."""

import dataclasses
import fnmatch
import re
from pathlib import Path

import pytest

from quantgate.judging.checks import CHECKS
from quantgate.subject.task import GENERATE


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_its_make_targets_and_files_exist(document: str, root: Path) -> None:
    text = (root / document).read_text(encoding="utf-8")
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"\bmake ([a-z-]+)", text))
    assert targets >= {"gate", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(
        r"\b(?:tools|src|fixtures|golden|suites|tests)/[\w/.-]*\w\.(?:py|jsonl)", text
    ):
        assert (root / path).exists(), path


def test_every_slow_test_is_listed_with_its_file(root: Path) -> None:
    """Nobody's test leaves `make test` unnoticed."""
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    slow = {
        f"tests/{path.parent.name}/{path.name}"
        for path in (root / "tests").glob("*/test_*.py")
        if re.search(r"^[^\"\n]*pytest\.mark\.slow\(", path.read_text(), re.MULTILINE)
    }
    rows = [line for line in text.splitlines() if line.startswith("| `tests/")]
    assert {name for row in rows for name in re.findall(r"`(tests/\w+/\w+\.py)`", row)} == slow


def test_ci_calls_what_the_readme_calls(readme: str, root: Path) -> None:
    commands = re.findall(r"^    (make \w+)$", readme, re.MULTILINE)
    script = (root / ".ci" / "run").read_text().splitlines()
    assert commands == ["make gate", "make test"]
    assert [line for line in script if line.startswith("make ")] == commands


def test_its_checkpoint_file_is_one(readme: str, tmp_path: Path) -> None:
    from quantgate.subject.checkpoint_file import read_checkpoint_file

    block = "\n".join(re.findall(r"```toml\n(.*?)```", readme, re.DOTALL))
    path = tmp_path / "fixtures" / "checkpoints" / "example.toml"
    path.parent.mkdir(parents=True)
    path.write_text(block)
    checkpoint = read_checkpoint_file(path, tmp_path)
    assert checkpoint.budget["quality"].margin == 0.05


def test_the_reward_models_file_is_one(root: Path, tmp_path: Path) -> None:
    from quantgate.subject.checkpoint_file import read_checkpoint_file

    text = (root / "docs" / "pooling.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.toml").write_text(block)
    checkpoint = read_checkpoint_file(tmp_path / "example.toml", tmp_path)
    assert (checkpoint.task, checkpoint.step_tag_id) == ("token_reward", 151651)


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        ("README.md", {GENERATE}),
        ("docs/pooling.md", {"token_classify", "token_reward", "sequence_reward", "token_embed"}),
    ],
)
def test_the_tables_of_checks_name_each_of_them(root: Path, file: str, tasks: set[str]) -> None:
    text = (root / file).read_text(encoding="utf-8")
    table = text.partition("\n| check |")[2].partition("\n\n")[0]
    named = re.findall(
        r"`([\w*-]+)`", "\n".join(row.split("|")[1] for row in table.splitlines()[2:])
    )
    # Ranks and graphs are the same for every task; the README has them.
    other_engines = ["tensor-parallel", "compiled"] if file != "README.md" else []
    expected = [
        name
        for check in CHECKS
        if tasks & {*check.tasks} and check.family not in other_engines
        for name in check.names
    ]
    found = [
        name
        for pattern in named
        for name in (fnmatch.filter(expected, pattern) if "*" in pattern else [pattern])
    ]
    assert sorted(found) == sorted(expected)


DOCUMENTS = [path.stem for path in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]


def test_every_part_of_make_gpu_is_described(root: Path) -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*?\?) \|", (root / "docs" / "gpu.md").read_text(), re.M)
    described = {name: text for names, text in rows for name in re.findall(r"`([\w-]+)`", names)}
    from gpu.parts import PARTS

    assert list(described) == list(PARTS)
    for name in PARTS.keys() - {"runner-v1", "runner-v2"}:  # one row for both
        assert described[name] == PARTS[name].question


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCUMENTS)]
)
def test_the_files_that_documents_link_to_exist(root: Path, document: str) -> None:
    text = (root / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http|#)([^)#]+)", text)
    folder = (root / document).parent
    assert [link for link in links if not (folder / link).exists()] == []
    named = re.findall(r"`((?:src|tests|tools|suites|fixtures|docs)/[\w/.-]+\.\w+)`", text)
    assert [name for name in named if not (root / name).exists()] == []


def test_the_file_of_a_real_checkpoint_is_one(root: Path, tmp_path: Path) -> None:
    from quantgate.subject.checkpoint import Checkpoint
    from quantgate.subject.checkpoint_file import read_checkpoint_file

    text = (root / "docs" / "adding-a-checkpoint.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.toml").write_text(block)
    checkpoint = read_checkpoint_file(tmp_path / "example.toml", tmp_path)
    assert checkpoint.invariance == ("tensor-parallel",)
    rows = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    keys = {key for row in rows for key in re.findall(r"`\[*([a-z_]+)", row)}
    known = {field.name for field in dataclasses.fields(Checkpoint)}
    assert known - keys == {"id", "root", "file", "is_base", "step_tag_id"}

"""`quantgate init`: what it writes, that it overwrites nothing, and that the example is one."""

import shutil
from pathlib import Path

import pytest

from quantgate.__main__ import main
from quantgate.subject.checkpoint_file import read_checkpoint_file, read_checkpoint_files

FILES = {
    "fixtures/checkpoints/example.toml.sample",
    "golden/.gitkeep",
    ".github/workflows/quantgate.yml",
}


def files(directory: Path) -> set[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)) for path in found}


def test_a_new_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three files; the example is no checkpoint until it is copied, and then it is one."""
    assert main(["init", str(tmp_path / "models")]) == 0
    assert files(tmp_path / "models") == FILES
    assert "copy fixtures/checkpoints/example.toml.sample" in capsys.readouterr().out
    assert read_checkpoint_files(tmp_path / "models") == {}
    folder = tmp_path / "models" / "fixtures" / "checkpoints"
    shutil.copy(folder / "example.toml.sample", folder / "mine.toml")
    assert read_checkpoint_file(folder / "mine.toml", tmp_path).engine.max_model_len == 2048
    # What it comments out is right, too.
    lines = (folder / "mine.toml").read_text().splitlines()
    begun = lines.index("[engine]  # vLLM's engine arguments")
    (folder / "mine.toml").write_text("\n".join(
        line.removeprefix("# ") if number > begun or "invariance" in line else line
        for number, line in enumerate(lines)
        if not (line.startswith("#") and line.endswith(":"))
    ))  # fmt: skip
    whole = read_checkpoint_file(folder / "mine.toml", tmp_path)
    assert whole.invariance == ("tensor-parallel", "compiled")
    assert (whole.budget["quality"].margin, len(whole.known_failure)) == (0.05, 1)


@pytest.mark.parametrize("name", sorted(FILES))
def test_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text("mine")
    assert main(["init", str(tmp_path)]) == 4
    assert f"{name}: it is there already" in capsys.readouterr().err
    assert files(tmp_path) == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_a_place_that_takes_no_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fixtures").write_text("a file")
    assert main(["init", str(tmp_path)]) == 4
    assert "it cannot be written" in capsys.readouterr().err


def test_goldens_of_a_new_repository_are_not_taken_for_orphans(tmp_path: Path) -> None:
    from quantgate.judging.golden import unclaimed

    assert main(["init", str(tmp_path)]) == 0
    assert unclaimed(tmp_path, {}) == []
    (tmp_path / "golden" / "x").mkdir()
    assert unclaimed(tmp_path, {}) == [tmp_path / "golden" / "x"]

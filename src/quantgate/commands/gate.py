"""`quantgate gate`: run the suites on checkpoints, in a checkout or as installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantgate.commands import companions
from quantgate.errors import BadInput
from quantgate.subject.shipped import shipped

SETTINGS = Path(__file__).with_name("gate.ini")


def run(
    project: Path,
    checkpoints: Sequence[str],
    base: str | None,
    report: Path,
    more: Sequence[str] = (),
) -> int:
    """Judge checkpoints, or all that have a file in the project; return pytest's exit status.

    `more` are pytest's own arguments.
    """
    import pytest

    if not project.is_dir():
        raise BadInput(f"--project {project}: no such directory.")
    if not checkpoints and not any((project / "fixtures" / "checkpoints").rglob("*.toml")):
        raise BadInput(
            f"{project / 'fixtures' / 'checkpoints'}: no checkpoint file there, so there is "
            "nothing to judge; name a checkpoint (`quantgate gate PATH --base BASE`), or begin "
            "with `quantgate init`."
        )
    companions.require()
    options = [word for name in checkpoints for word in ("--checkpoint", name)]
    options += ["--base", base] if base is not None else []
    options += ["--gate-report", str(report.absolute())]
    return pytest.main([*suites_of(project), *options, *more])


def suites_of(project: Path) -> list[str]:
    """Return pytest's arguments for the suites of a project: its own, or those of quantgate.

    A project has suites of its own if it has both `suites` and `pyproject.toml`, as a checkout has.
    """
    root = ["--rootdir", str(project.absolute())]
    suites, settings = project / "suites", project / "pyproject.toml"
    if suites.is_dir() and settings.is_file():
        return [str(suites), *root, "-c", str(settings)]
    # pytest takes no conftest.py from above the settings: a virtual environment is often inside the
    # project, whose conftest.py is for its own tests.
    return [str(shipped("suites")), *root, "-c", str(SETTINGS)]

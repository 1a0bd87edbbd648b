"""`quantgate gate`: run the suites on checkpoints, in a checkout or as installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.commands import companions
from quantgate.errors import BadInput
from quantgate.subject.checkpoint_file import CHECKPOINT_FILES
from quantgate.subject.shipped import shipped

SETTINGS = Path(__file__).with_name("gate.ini")


@dataclass(frozen=True)
class Asked:
    """What is asked of `quantgate gate`."""

    project: Path
    checkpoints: Sequence[str]
    """Paths, hub ids or ids; none for all that have a file in the project."""
    base: str | None
    report: Path
    more: Sequence[str] = ()
    """pytest's own arguments."""

    def require_something(self) -> None:
        """Raise `BadInput` if there is no project, or nothing to judge."""
        if not self.project.is_dir():
            raise BadInput(f"--project {self.project}: no such directory.")
        files = self.project / CHECKPOINT_FILES
        if not self.checkpoints and not any(files.rglob("*.toml")):
            raise BadInput(
                f"{files}: no checkpoint file there, so there is nothing to judge; name a "
                "checkpoint (`quantgate gate PATH --base BASE`), or begin with `quantgate init`."
            )

    def words(self, shard: str) -> list[str]:
        """Return the arguments of `quantgate` that judge one shard of this."""
        base = ["--base", self.base] if self.base is not None else []
        project = str(self.project.absolute())
        given = ["gate", *self.checkpoints, *base, "--project", project, "--shard", shard]
        return [*given, "--", *self.more]


def run(asked: Asked) -> int:
    """Judge what is asked; return pytest's exit status."""
    import pytest

    asked.require_something()
    companions.require()
    options = [word for name in asked.checkpoints for word in ("--checkpoint", name)]
    options += ["--base", asked.base] if asked.base is not None else []
    options += ["--gate-report", str(asked.report.absolute())]
    return pytest.main([*suites_of(asked.project), *options, *asked.more])


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

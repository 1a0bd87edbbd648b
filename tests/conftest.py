"""What the tests of the gate share: the embedded model, small checkpoints, a project to gate."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def quantized() -> Path:
    """The embedded W4A16 checkpoint, built by `make checkpoints`."""
    path = ROOT / "build" / "tiny-llama-w4a16"
    assert path.is_dir(), "run `make checkpoints` first"
    return path


@pytest.fixture
def quantized_copy(quantized: Path, tmp_path: Path) -> Path:
    """A copy of the W4A16 checkpoint, to damage."""
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """Load a script from tools/, which is not a package, by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project to gate in: the suites, the embedded fixtures and goldens, to change at will.

    Its checkpoints are read where `make checkpoints` built them.
    """
    copy = tmp_path / "project"
    for name in ("suites", "fixtures", "golden"):
        shutil.copytree(ROOT / name, copy / name)
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "build").symlink_to(ROOT / "build")
    return copy


Pytest = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_gate(project: Path) -> Pytest:
    """Run pytest in `project` with the given arguments, as a user would."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *map(str, arguments)],
            cwd=project,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def edit_config(directory: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Change a checkpoint's config.json in place."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))

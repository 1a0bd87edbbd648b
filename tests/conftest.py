"""What the tests of the gate share: the embedded model, small checkpoints, a project to gate."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
from harness import RunGate, lacking
from hypothesis import settings
from smaller import shrink, smaller

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from quantgate.subject.probe import Probe

ROOT = Path(__file__).resolve().parent.parent
# How long an example takes says how busy the machine is.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


def pytest_report_header() -> list[str]:
    """Say at the start what will be skipped, and how to have it run."""
    return [f"skipped for want of {name}: {how}" for name, how in lacking(ROOT).items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Require a reason of each slow test; run the files that are marked long first.

    As one of the last, a long file would keep one worker busy while the others have nothing to do.
    `make test` tells xdist to leave the order alone.
    """
    for item in items:
        for marker in item.iter_markers("slow"):
            if not marker.kwargs.get("reason"):
                raise pytest.UsageError(f"{item.nodeid}: say why it is slow: slow(reason=…)")
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def readme(root: Path) -> str:
    """The README's text."""
    return (root / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def quantized() -> Path:
    """The embedded W4A16 checkpoint, built by `make checkpoints`."""
    path = ROOT / "build" / "tiny-llama-w4a16"
    assert path.is_dir(), "run `make checkpoints` first"
    return path


@pytest.fixture(scope="session")
def probe(root: Path) -> "Probe":
    """The embedded probe."""
    from quantgate.subject.probe import read_probe

    return read_probe(root / "fixtures" / "probes" / "tiny.jsonl")


@pytest.fixture(scope="session")
def large_probe(root: Path) -> "Probe":
    """The embedded probe of more and longer windows."""
    from quantgate.subject.probe import embedded_probe
    from quantgate.subject.task import GENERATE

    return embedded_probe(root, GENERATE, quality=True)


@pytest.fixture(scope="session")
def hf_scores(root: Path, large_probe: "Probe") -> "list[NDArray[np.float64]]":
    """HF's float32 scores of each window of the larger probe by the tiny model.

    A prefix of a window has a prefix of its scores.
    """
    import numpy as np

    ends = np.cumsum([window.scored for window in large_probe.windows])
    return np.split(_hf(root, large_probe, "float32"), ends[:-1])


@pytest.fixture(scope="session")
def hf_limit(root: Path, large_probe: "Probe", hf_scores: "list[NDArray[np.float64]]") -> float:
    """How far scores in float32 may be from `hf_scores`: as the gate allows it.

    1e-5, or what float32's rounding costs HF itself, twice.
    """
    import numpy as np

    from quantgate.judging.budget import FP32_MAX, ROUNDING_FACTOR

    moved = np.abs(np.concatenate(hf_scores) - _hf(root, large_probe, "float64")).max()
    return max(FP32_MAX, ROUNDING_FACTOR * float(moved))


def _hf(root: Path, probe: "Probe", dtype: str) -> "NDArray[np.float64]":
    import numpy as np

    from quantgate.measuring import reference

    model = root / "fixtures" / "tiny" / "llama"
    measured = reference.measure(model, probe, dtype=dtype, announce=lambda _: None)
    return measured.logprob.astype(np.float64)


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


@pytest.fixture(scope="session")
def small_probe(probe: "Probe") -> "Probe":
    """The probe of a test's project: beginnings of the embedded one's windows."""
    return smaller(probe)


@pytest.fixture(scope="session")
def small_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a test's project is copied from: suites, fixtures and goldens, of smaller probes."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("suites", "fixtures", "golden/tiny-llama-w4a16"):
        shutil.copytree(ROOT / name, copy / name)
    shrink(copy)
    return copy


@pytest.fixture
def project(small_project: Path, tmp_path: Path) -> Path:
    """A project to gate one checkpoint in, W4A16: its suites, fixtures and goldens may be changed.

    Its checkpoint is read where `make checkpoints` built it. Its probes are smaller than ours.
    """
    copy = Path(shutil.copytree(small_project, tmp_path / "project"))
    for path in (copy / "fixtures" / "checkpoints").glob("*.toml"):
        if path.stem != "tiny-llama-w4a16":
            path.unlink()
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "build").symlink_to(ROOT / "build")
    return copy


@pytest.fixture
def run_gate(project: Path) -> RunGate:
    """The gate in a project of its own."""
    return RunGate(project)

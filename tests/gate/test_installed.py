"""The wheel, installed in an environment of its own without the checkout, does what users do.

The quick tests borrow this environment's libraries, but not its quantgate; the slow one lets pip
install everything, and gates with every check.
"""

import json
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from harness import persons_environment

pytestmark = pytest.mark.long

CHECKPOINT = """
source = "{source}"
base = "{base}"
scheme = "W4A16"
[engine]
max_model_len = 1024
enforce_eager = true
kernels = "portable"
"""
Quantgate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (path,) = directory.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def borrowing(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of the wheel and of this one's libraries.

    Python follows only the first .pth file, so it does not see the checkout that this environment's
    own points to.
    """
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory)
    python = directory / "bin" / "python"
    (packages,) = directory.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index"]
    subprocess.run([*command, "--no-deps", str(wheel)], check=True, capture_output=True)
    return directory


def outside(environment: Path, directory: Path) -> Quantgate:
    """Return `quantgate` of an environment, as called in a directory outside the checkout."""
    variables = {name: value for name, value in persons_environment().items()
                 if name not in ("PYTHONPATH", "GITHUB_ACTIONS", "GITHUB_WORKSPACE")}  # fmt: skip

    def run(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        script, *others = arguments
        return subprocess.run(
            [environment / "bin" / script, *others], cwd=directory, env={**variables, **more},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


@pytest.fixture
def installed(borrowing: Path, tmp_path: Path) -> Quantgate:
    (tmp_path / "empty").mkdir()
    return outside(borrowing, tmp_path / "empty")


def test_the_wheel_has_what_a_run_needs(wheel: Path, root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, ends in (("suites", "*.py"), ("fixtures/probes", "*.jsonl")):
        own = {f"quantgate/{path.relative_to(root)}" for path in (root / folder).glob(ends)}
        assert own
        assert own <= names
    source = root / "src" / "quantgate"
    files = {path.relative_to(source.parent) for path in source.rglob("*") if path.is_file()}
    own = {str(path) for path in files if "__pycache__" not in path.parts}
    assert own <= names
    others = {
        name for name in names if not name.startswith("quantgate/") and "dist-info" not in name
    }
    assert others == set()
    (points,) = [name for name in names if name.endswith("entry_points.txt")]
    said = zipfile.ZipFile(wheel).read(points).decode()
    assert "quantgate = quantgate.__main__:main" in said
    assert "pytest11" not in said


def test_the_command_is_the_wheels(installed: Quantgate, root: Path) -> None:
    """And it is called by its name, in its help and by Python."""
    where = "import quantgate, sys; print(quantgate.__file__, 'pytest' in sys.modules)"
    said = installed("python", "-c", where).stdout
    assert str(root) not in said
    assert "site-packages/quantgate/__init__.py False" in said
    for command, name in ((["quantgate"], "quantgate"),
                          (["python", "-m", "quantgate"], "python -m quantgate")):  # fmt: skip
        done = installed(*command, "--help")
        assert done.returncode == 0
        assert done.stdout.startswith(f"usage: {name} [-h] COMMAND ...")
        for verb in ("gate", "audit", "doctor", "budgets", "checks", "approve", "init", "card"):
            assert re.search(rf"^ +{verb} ", done.stdout, re.MULTILINE), verb


def test_an_empty_directory(
    installed: Quantgate, quantized: Path, root: Path, tmp_path: Path
) -> None:
    """Judged before an engine starts: verdict and report are there, and nothing else is touched."""
    base = root / "fixtures" / "tiny" / "llama"
    refused = installed("quantgate", "gate")
    assert refused.returncode == 4
    assert "name a checkpoint (`quantgate gate PATH --base BASE`)" in refused.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    done = installed("quantgate", "gate", quantized, "--base", base, "--", "-k",
                     "(audit or drift) and not loaded")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: PASS" in done.stdout
    assert "it has no golden: given by path" in done.stdout
    assert "run `quantgate approve --checkpoint ID`" in done.stdout
    report = tmp_path / "empty" / "report"
    (judged,) = json.loads((report / "gate.json").read_text())["checkpoints"]
    assert [check["name"] for check in judged["checks"]] == ["audit", "audit-weights"]
    assert {path.name for path in report.iterdir()} == {
        "gate.json", "gate.md", "index.html", "junit.xml",
    }  # fmt: skip
    assert {path.name for path in report.parent.iterdir()} <= {
        "report", ".pytest_cache", ".gate-cache",
    }  # fmt: skip


def test_settings_and_tests_of_the_directory_are_not_the_gates(
    borrowing: Path, quantized: Path
) -> None:
    """Not even if the environment is inside it, as .venv often is."""
    own = {
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--no-such"\n',
        "conftest.py": "raise RuntimeError('mine')\n",
        "test_mine.py": "raise RuntimeError('mine')\n",
    }
    for name, text in own.items():
        (borrowing / name).write_text(text)
    quantgate = outside(borrowing, borrowing)
    done = quantgate("quantgate", "gate", quantized, "--", "--co", "-q", "-k", "fidelity")
    for name in own:
        (borrowing / name).unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_fidelity[tiny-llama-w4a16-cpu-float32]" in done.stdout


def test_the_suites_run_by_their_packages_name(installed: Quantgate, quantized: Path) -> None:
    done = installed(
        "python", "-m", "pytest", "--pyargs", "quantgate.suites", "-p", "quantgate.pytest_plugin",
        "--checkpoint", quantized, "-k", "audit and not weights", "--gate-report", "report",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: PASS" in done.stdout


def test_a_new_repository_is_gated(
    installed: Quantgate, quantized: Path, root: Path, tmp_path: Path
) -> None:
    """`quantgate init`, a checkpoint's file, and a gate that fails, as GitHub shows it.

    The engine and the probe are the installed ones.
    """
    assert installed("quantgate", "init").returncode == 0
    (file := tmp_path / "empty" / "fixtures" / "checkpoints" / "mine.toml").write_text(
        CHECKPOINT.format(source=quantized, base=root / "fixtures" / "tiny" / "llama")
    )
    done = installed(
        "quantgate", "gate", "--", "-k", "float32 and (fidelity or drift)",
        GITHUB_ACTIONS="true", GITHUB_WORKSPACE=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (judged,) = json.loads((tmp_path / "empty/report/gate.json").read_text())["checkpoints"]
    assert {check["name"]: check["verdict"] for check in judged["checks"]} == {
        "fidelity-float32": "pass", "drift-float32": "not-run",
    }  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("::error")]
    number = file.read_text().splitlines().index(f'source = "{quantized}"') + 1
    assert line.startswith(
        f"::error file=empty/fixtures/checkpoints/mine.toml,line={number},"
        "title=mine drift-float32%3A NOT-RUN::"
    )
    assert "%0Anext: if intended, quantgate approve --checkpoint mine" in line


@pytest.mark.slow(reason="pip installs vLLM and all, then every check runs, with compiled engines")
def test_everything_from_an_empty_environment(
    wheel: Path,
    quantized: Path,
    root: Path,
    tmp_path: Path,
    tool: Callable[[str], ModuleType],
) -> None:
    """Install, gate, put on a card, take goldens, and gate again."""
    venv.create(tmp_path / "environment", with_pip=True)
    (tmp_path / "empty").mkdir()
    quantgate = outside(tmp_path / "environment", tmp_path / "empty")
    # As in the README, but first as where there is a copy of torch's CPU build.
    for options in ([], ["--extra-index-url", tool("make_env").TORCH_CPU_INDEX]):
        done = quantgate("pip", "install", "-q", f"quantgate[cpu] @ {wheel.as_uri()}", *options)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    base = root / "fixtures" / "tiny" / "llama"
    done = quantgate("quantgate", "gate", quantized, "--base", base)
    if remedy := re.search(r"^error: .*: run `(pip uninstall -y [a-z ]+)`\.$", done.stderr):
        assert quantgate(*remedy[1].split()).returncode == 0
        done = quantgate("quantgate", "gate", quantized, "--base", base)
    assert done.returncode == 0, done.stdout + done.stderr
    report = tmp_path / "empty" / "report"
    content = json.loads((report / "gate.json").read_text())
    assert content["verdict"] == "pass"
    assert len(content["checkpoints"][0]["checks"]) == 11
    assert quantgate("quantgate", "card", "report").returncode == 4  # the base is a directory
    assert quantgate("quantgate", "card", "report", "--base", "org/base").returncode == 0
    assert "| perplexity |" in (report / "card.md").read_text()

    shutil.rmtree(report)
    assert quantgate("quantgate", "init").returncode == 0
    (tmp_path / "empty" / "fixtures" / "checkpoints" / "mine.toml").write_text(
        CHECKPOINT.format(source=quantized, base=base)
    )
    done = quantgate("quantgate", "approve", "--checkpoint", "mine", "--reason", "first release")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "empty" / "golden" / "mine").glob("drift-*.json"))) == 2
    done = quantgate("quantgate", "gate", "mine", "--", "-k", "drift", "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    (judged,) = json.loads((report / "gate.json").read_text())["checkpoints"]
    assert [check["verdict"] for check in judged["checks"]] == ["pass", "pass"]

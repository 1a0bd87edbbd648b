"""A run in a process that has vLLM imported already is one in a new process, but for the time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import run_python

SCRIPT = """
import atexit, os, sys
atexit.register(lambda: print("the end", file=sys.stderr))
print(sys.argv, __name__, sys.path[0], os.getcwd(), os.environ.get("CI"), sys.stdin.read())
print(sorted(name for name in sys.modules if name.startswith("quantgate")))
class Here: pass
print(Here.__module__, sys.modules["__main__"].Here is Here)
END
"""
ENDS = {
    "end": "print('whole')",
    "status": "sys.exit(3)",
    "sentence": "sys.exit('error: why')",
    "error": "raise ValueError('why')",
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("how", ["script", "module", "statements"])
def test_a_run_is_as_in_a_new_process(
    end: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "yes")
    script = tmp_path / "here.py"
    script.write_text(SCRIPT.replace("END", ENDS[end]))
    arguments = {
        "script": [str(script), "x", "-y"],
        "module": ["-m", "here", "x", "-y"],
        "statements": ["-c", script.read_text(), "x", "-y"],
    }[how]
    found = run_python(*arguments, cwd=tmp_path)
    expected = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if how != "script":  # which an interpreter writes as "" where it looks in its own directory
        expected.stdout = expected.stdout.replace("__main__  ", f"__main__ {tmp_path} ")
    assert (found.returncode, found.stdout) == (expected.returncode, expected.stdout)
    assert found.stderr.splitlines()[-2:] == expected.stderr.splitlines()[-2:]
    assert "the end" in found.stderr


def test_what_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", "import time; time.sleep(60)", cwd=tmp_path, timeout=0.5)
    assert run_python("-c", "print('next')", cwd=tmp_path).stdout == "next\n"


def test_another_environment_is_a_new_process(tmp_path: Path) -> None:
    """Libraries read their variables while they are imported, which has happened already here."""
    script = "import os, sys; print('torch' in sys.modules, os.environ.get('OMP_NUM_THREADS'))"
    assert run_python("-c", script, cwd=tmp_path).stdout.startswith("True")
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    assert run_python("-c", script, cwd=tmp_path, env=environment).stdout == "False 3\n"

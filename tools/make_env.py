"""Set up the project's virtual environment: what `make env` runs. Standard library only.

    python3 tools/make_env.py [.venv]
    python3 tools/make_env.py .venv-gpu --extras gpu,dev --require vllm==0.26.0

A second run finds the stamp of the first and installs nothing.
"""

import argparse
import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where the `+cpu` build of torch comes from on a machine that has no copy of its own.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# vLLM asks for them, and its text path never imports them. The builds that fit a CUDA torch break
# `import transformers` beside a CPU torch.
OPTIONAL_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def fingerprint(extras: str, required: list[str]) -> str:
    """Return what decides whether an environment is up to date."""
    content = (ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    return hashlib.sha256(content + f"{sys.version} {extras} {required}".encode()).hexdigest()


def install(python: Path, extras: str, required: list[str]) -> None:
    """Install the project, editable, with its extras; with PyTorch's CPU index if need be."""
    print(f"make_env: installing quantgate[{extras}] with vLLM, about 2 minutes", flush=True)
    command = [str(python), "-m", "pip", "install", "-q", "-e", f"{ROOT}[{extras}]", *required]
    if subprocess.run(command, check=False).returncode == 0:
        return
    if "cpu" not in extras.split(","):
        raise subprocess.CalledProcessError(1, command)
    print(f"make_env: the plain install failed; trying again with {TORCH_CPU_INDEX}", flush=True)
    subprocess.run([*command, "--extra-index-url", TORCH_CPU_INDEX], check=True)


def remove_broken_companions(python: Path) -> None:
    """Uninstall torch's companions that are there but do not import."""
    for name in OPTIONAL_COMPANIONS:
        probe = (
            "import importlib.util, sys\n"
            f"if importlib.util.find_spec('{name}') is None: sys.exit(0)\n"
            f"import {name}\n"
        )
        if subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode:
            print(f"make_env: removing {name}, which does not import beside this torch", flush=True)
            subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", name], check=True)


def main() -> int:
    """Create the environment unless it is up to date."""
    parser = argparse.ArgumentParser(description="Set up the virtual environment.")
    parser.add_argument("directory", nargs="?", default=".venv", type=Path)
    parser.add_argument("--extras", default="cpu,dev", help="of pyproject.toml")
    parser.add_argument("--require", action="append", default=[], metavar="NAME==VERSION")
    arguments = parser.parse_args()
    directory, extras = (ROOT / arguments.directory).resolve(), arguments.extras
    stamp = directory / ".quantgate-env"
    if stamp.exists() and stamp.read_text() == fingerprint(extras, arguments.require):
        return 0
    if sys.version_info < (3, 11):  # noqa: UP036  run by whatever python3 is on the machine
        print("make_env: Python 3.11 or newer is needed", file=sys.stderr)
        return 2
    stamp.unlink(missing_ok=True)
    if not (directory / "bin" / "python").exists():
        venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    try:
        install(python, extras, arguments.require)
        remove_broken_companions(python)
    except subprocess.CalledProcessError as error:
        print(f"make_env: {' '.join(map(str, error.cmd))} failed", file=sys.stderr)
        return 1
    stamp.write_text(fingerprint(extras, arguments.require))
    return 0


if __name__ == "__main__":
    sys.exit(main())

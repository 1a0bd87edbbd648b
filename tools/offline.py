"""Pack everything that a GPU machine without a network needs for `make gpu`, and a run script.

    ssh gpu python3 -m pip freeze > have.txt
    python tools/offline.py --python 3.12 --have have.txt
    rsync -a build/offline/ gpu:quantgate/ && ssh gpu bash quantgate/run.sh --out figures

Packages that the machine already has (torch, vLLM …) are not packed and keep their versions. There,
run.sh unpacks the rest beside the machine's own packages, builds the embedded checkpoints, and
passes its arguments to tools/measure_gpu.py.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import requires
from pathlib import Path

from quantgate.atomic import write_atomically
from quantgate.errors import BadInput

ROOT = Path(__file__).resolve().parent.parent
# pip does not match ranges, so each is listed.
GLIBC_MINORS = range(17, 40)
NAME = re.compile(r"[A-Za-z0-9._-]+")
RUN = """#!/usr/bin/env bash
# Made by tools/offline.py. Measures what needs a GPU; arguments go to tools/measure_gpu.py.
set -euo pipefail
cd "$(dirname "$0")"
python=${{PYTHON:-python3}}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$version" != {version} ]; then
    echo "error: $python is Python $version, and this was packed for {version}; set PYTHON." >&2
    exit 2
fi
if [ ! -e site/.ready ]; then
    # A directory, not a virtual environment: the machine's own packages may be in one already.
    rm -rf site
    "$python" -m pip install --quiet --no-index --no-deps --target site wheels/*.whl
    mkdir -p source && tar -xzf source.tar.gz -C source
    touch site/.ready
fi
export PYTHONPATH="$PWD/site${{PYTHONPATH:+:$PYTHONPATH}}" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
"$python" source/tools/quantize_tiny.py
exec "$python" source/tools/measure_gpu.py "$@"
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Pack what an offline GPU machine needs.")
    parser.add_argument("--python", default="3.12", help="that machine's, e.g. 3.12")
    parser.add_argument(
        "--have", type=Path, required=True, help="what `pip freeze` prints on that machine"
    )
    parser.add_argument("--machine", default="x86_64", choices=["x86_64", "aarch64"])
    parser.add_argument("--extra", default="gpu", choices=["gpu", "cpu"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "offline")
    return parser.parse_args()


def canonical(requirement: str) -> str:
    """Return the normalized name of a requirement or wheel."""
    found = NAME.match(requirement)
    return re.sub(r"[-_.]+", "-", found[0]).lower() if found else ""


def pinned(path: Path) -> dict[str, str]:
    """Return a machine's installed versions, by package name."""
    if not path.is_file():
        raise BadInput(f"--have {path}: no such file; give what `pip freeze` prints there.")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==", 1) for line in lines if "==" in line and " " not in line)
    if not found:
        raise BadInput(f"--have {path}: no line of it is NAME==VERSION.")
    return {canonical(name): version for name, version in found.items()}


def missing(have: dict[str, str], extra: str) -> list[str]:
    """Return quantgate's requirements, including an extra's, that the machine lacks."""
    wanted = []
    for line in requires("quantgate") or ():
        requirement, _, condition = line.partition(";")
        if (not condition or extra in condition) and canonical(requirement) not in have:
            wanted.append(requirement.strip())
    return wanted


def download(arguments: argparse.Namespace, have: dict[str, str], wheels: Path) -> None:
    """Download the wheels that the machine lacks, for its Python, with their dependencies."""
    platforms = [f"manylinux_2_{minor}_{arguments.machine}" for minor in GLIBC_MINORS]
    platforms += [f"manylinux2014_{arguments.machine}", f"manylinux1_{arguments.machine}"]
    tags = [word for platform in platforms for word in ("--platform", platform)]
    if not (wanted := missing(have, arguments.extra)):
        return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        # No registry has local versions such as "2.11.0+cu130".
        pins = (f"{name}=={version.partition('+')[0]}\n" for name, version in have.items())
        constraints.writelines(pins)
        constraints.flush()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        command += ["--python-version", arguments.python, "--implementation", "cp", *tags]
        command += ["--constraint", constraints.name, "--dest", str(wheels), *wanted]
        if subprocess.run(command, check=False).returncode:
            raise BadInput("pip found no wheels that fit what the machine has: see above.")
    for wheel in wheels.glob("*.whl"):
        if canonical(wheel.name.split("-")[0]) in have:
            wheel.unlink()


def pack(arguments: argparse.Namespace) -> None:
    """Pack the wheels, the source and run.sh."""
    have = pinned(arguments.have)
    out: Path = arguments.out
    shutil.rmtree(out, ignore_errors=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir"]
    subprocess.run([*build, str(wheels), str(ROOT)], check=True)
    download(arguments, have, wheels)
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    with tarfile.open(out / "source.tar.gz", "w:gz") as archive:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).exists():
                archive.add(ROOT / name, name)
    write_atomically(out / "run.sh", RUN.format(version=arguments.python))


def main() -> int:
    """Command-line entry point; returns 2 on a user error."""
    arguments = parse_arguments()
    try:
        pack(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 2**20:.0f} MiB; there: bash run.sh --out figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())

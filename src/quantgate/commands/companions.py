"""torch's companions, whose builds for CUDA break `import transformers` beside a CPU torch.

vLLM asks pip for them and never imports them for text; without PyTorch's own index, pip finds only
the builds for CUDA.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from quantgate.errors import BadInput

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
CPU = "+cpu"


def broken() -> list[str]:
    """Return the companions that are installed and do not import beside a CPU build of torch."""
    if CPU not in _version("torch"):
        return []
    return [name for name in COMPANIONS if CPU not in (_version(name) or CPU) and _fails(name)]


def require() -> None:
    """Raise `BadInput` if a companion is broken: no model would load."""
    if names := broken():
        raise BadInput(
            f"{', '.join(names)}: built for another torch than {_version('torch')}, so "
            "transformers cannot be imported; vLLM does not need it for text: run `pip uninstall "
            f"-y {' '.join(names)}`."
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _fails(name: str) -> bool:
    """Whether an import fails, in a process of its own: a failed one leaves half of a module."""
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode != 0

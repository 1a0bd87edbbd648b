"""What a measurement depends on besides the checkpoint: devices and library versions."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from quantgate.patches.scoremode.hooks import vllm_version


def available_devices() -> dict[str, str]:
    """Return the devices that the installed vLLM can use here, with their golden platforms."""
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {"cuda": f"sm{major}{minor}"}
    return {"cpu": "cpu"}


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that a score depends on."""
    return dict(_library_versions())


@functools.cache  # every search walks all installed packages
def _library_versions() -> tuple[tuple[str, str], ...]:
    versions = {"vllm": vllm_version()}
    for name in ("torch", "transformers", "compressed-tensors", "quantgate"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return tuple(versions.items())

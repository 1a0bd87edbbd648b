"""Let `torch.cpu` answer as a lesser processor: in every Python that tools/as_machine.py starts.

vLLM chooses its C library, and some kernels, by it. Python imports a module of this name when it
starts, wherever PYTHONPATH has one. No installed package reads any of this.
"""

import os
from types import MappingProxyType, ModuleType

import wrapt

HIDDEN = tuple(os.environ.get("AS_MACHINE_HIDES", "").split())


@wrapt.when_imported("torch.cpu")
def hide(module: ModuleType) -> None:
    """Say no to what is hidden; `torch.cpu`'s other functions ask this one."""
    found = {
        name: value and not name.startswith(HIDDEN)
        for name, value in module.get_capabilities().items()
    }
    module.get_capabilities = lambda: MappingProxyType(found)  # type: ignore[attr-defined]

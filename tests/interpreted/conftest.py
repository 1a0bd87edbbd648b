"""What runs in Triton's interpreter, in a process that `test_interpreted.py` starts.

Triton decides when it is imported, so the other tests are not collected in any other process.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    starts_it = collection_path.name == "test_interpreted.py"
    return True if collection_path.suffix == ".py" and starts_it == INTERPRETED else None


class ActiveDriver:
    """What vLLM asks before it uses Triton: without an active driver it does not."""

    @staticmethod
    def is_active() -> bool:
        return True


if INTERPRETED:
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=ActiveDriver, compiler=None)


def pytest_configure(config: pytest.Config) -> None:
    # The interpreter computes in numpy, which warns of what a GPU does in silence.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")

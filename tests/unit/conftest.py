"""Unit tests take seconds, so none of them imports vLLM, which alone costs a processor 15 s."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    only_unit_tests = all(item.path.is_relative_to(FOLDER) for item in session.items)
    if only_unit_tests and "vllm" in sys.modules:
        raise pytest.UsageError(
            "collecting tests/unit imported vLLM: see with `python -X importtime`"
        )


@pytest.fixture(autouse=True)
def _imports_no_vllm() -> Iterator[None]:
    """Fail the test that imports vLLM, if no test of another folder has done so before."""
    before = "vllm" in sys.modules
    yield
    if "vllm" in sys.modules and not before:
        pytest.fail("this test imported vLLM: it belongs in tests/engine")

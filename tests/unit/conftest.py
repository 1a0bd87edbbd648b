"""Unit tests take seconds: vLLM costs a processor 15 s to import, and transformers 10 s."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
DEAR = {"vllm", "transformers"}


def pytest_collection_finish(session: pytest.Session) -> None:
    only_unit_tests = all(item.path.is_relative_to(FOLDER) for item in session.items)
    if only_unit_tests and (names := DEAR & sys.modules.keys()):
        raise pytest.UsageError(f"collecting tests/unit imported {min(names)}: import it in a test")


@pytest.fixture(autouse=True)
def _imports_nothing_dear() -> Iterator[None]:
    """Fail a test that imports vLLM or transformers, if no test of another folder has before."""
    before = DEAR & sys.modules.keys()
    yield
    if names := (DEAR & sys.modules.keys()) - before:
        pytest.fail(f"this test imported {' and '.join(sorted(names))}: it belongs in tests/engine")

"""Unit tests take seconds: vLLM costs a processor 15 s to import, and transformers 10 s."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
DEAR = {"vllm", "transformers"}


@pytest.fixture(scope="session")
def _has_other_tests(request: pytest.FixtureRequest) -> bool:
    """Whether tests of other folders, which may import anything, run in this process too."""
    return not all(item.path.is_relative_to(FOLDER) for item in request.session.items)


@pytest.fixture(scope="session")
def _known() -> set[str]:
    """What is imported, and no unit test's fault or reported already."""
    return set()


@pytest.fixture(autouse=True)
def _imports_nothing_dear(_has_other_tests: bool, _known: set[str]) -> Iterator[None]:
    """Fail a test that imports vLLM or transformers; the first one, if collecting them does."""
    if _has_other_tests:
        _known |= DEAR & sys.modules.keys()
    yield
    if names := (DEAR & sys.modules.keys()) - _known:
        _known |= names
        pytest.fail(f"unit tests must not import {' and '.join(sorted(names))}: see tests/engine")

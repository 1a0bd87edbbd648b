"""Unit tests take seconds, so none of them imports vLLM, which alone costs a processor 15 s."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def _has_other_tests(request: pytest.FixtureRequest) -> bool:
    """Whether this process runs tests of other folders too, which may import vLLM."""
    return not all(item.path.is_relative_to(FOLDER) for item in request.session.items)


@pytest.fixture(autouse=True)
def _imports_no_vllm(_has_other_tests: bool) -> Iterator[None]:
    """Fail the first test after which vLLM is imported, whatever imported it."""
    is_excused = _has_other_tests and "vllm" in sys.modules
    yield
    if "vllm" in sys.modules and not is_excused:
        pytest.fail("vLLM was imported by this test or while it was collected: move it to engine/")

"""The examples in docstrings of what people import are run, and give what they say."""

import doctest
from types import ModuleType

import pytest

from quantgate.judging import stats, verdict


@pytest.mark.parametrize(("module", "fewest"), [(verdict, 3), (stats, 1)])
def test_examples_give_what_they_say(module: ModuleType, fewest: int) -> None:
    examples = [test for test in doctest.DocTestFinder().find(module) if test.examples]
    assert len(examples) >= fewest
    runner = doctest.DocTestRunner()
    for example in examples:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0

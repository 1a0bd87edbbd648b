"""Failures of an engine are told apart, and explained in one sentence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.measuring import engine_failure
from quantgate.measuring.engine_failure import EngineFailure, explained, require_device
from quantgate.plugin.scheduling import check_of


@given(
    name=st.from_regex(r"[a-z]+(_[a-z0-9]+)*", fullmatch=True),
    checkpoint=st.from_regex(r"[a-z0-9][a-z0-9.-]*", fullmatch=True),
    device=st.sampled_from(["cpu", "cuda"]),
    dtype=st.sampled_from(["", "float32", "serving"]),
)
def test_a_checks_name_is_read_from_its_id(
    name: str, checkpoint: str, device: str, dtype: str
) -> None:
    parameters = "-".join(filter(None, (checkpoint, device, dtype)))
    found = check_of(f"suites/test_x.py::test_{name}[{parameters}]")
    assert found == "-".join(filter(None, (name.replace("_", "-"), dtype)))
    assert check_of(f"tests/test_x.py::test_{name}") is None
    # A test whose parameter is such an id is none.
    assert check_of(f"tests/test_x.py::test_y[x.py::test_{name}[{parameters}]-z]") is None


def test_mistakes_and_bad_input_keep_their_tracebacks() -> None:
    for error in (TypeError("x"), KeyError("x"), BadInput("x"), EngineFailure("x")):
        with pytest.raises(type(error)), explained("it", but=engine_failure.MISTAKES):
            raise error


@pytest.mark.parametrize(
    "noticed",
    [
        "cancelled",  # the engine's future, in this process
        "the engine's process has ended",  # our own watch of it
        "Executor failed.",  # the engine's watch of its workers
        # Another rank, in the middle of a collective of gloo's, through vLLM's executor.
        "Worker failed with error '[gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:33451. This is typically caused by a remote worker crashing. Check the logs "
        "of the remote worker before reporting an error.', please check the stack trace above",
        "[gloo/transport/tcp/pair.cc:456] writev [127.0.0.1]:3345: Connection reset by peer",
    ],
)
def test_a_process_that_ended_is_named_whoever_notices_it(noticed: str) -> None:
    """Several processes wait for one that is killed; which of them speaks first is a race."""
    with (
        pytest.raises(EngineFailure, match=r"a process of vLLM's has ended; .* `dmesg` says"),
        explained("it"),
    ):
        raise RuntimeError(noticed)


def test_a_device_that_answers_is_not_lost() -> None:
    with pytest.raises(EngineFailure, match="it \\(RuntimeError: CUDA error: x\\): the driver"):
        with explained("it"):
            raise RuntimeError("CUDA error: x")
    require_device()

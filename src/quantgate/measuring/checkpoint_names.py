"""Which of a checkpoint's tensors make which parameter of HF's model, by transformers' own rules.

transformers names and shapes some parameters differently from checkpoints: it prefixes bodies,
renames blocks, stacks experts. Its tables for `from_pretrained` define how. Here they are applied
to tensors read one at a time, and to quantized ones, whose parts together represent a weight.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

WEIGHT = "weight"


@dataclass
class Origin:
    """The tensors that one parameter, or several, are made of."""

    converter: Any = None
    """transformers' `WeightConverter`; None if the tensor is the parameter itself."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Names of weights in the checkpoint, by the converter pattern that they match."""

    @property
    def names(self) -> list[str]:
        """The names of all its tensors."""
        return [name for names in self.parts.values() for name in names]


class CheckpointNames:
    """The checkpoint's names for the modules and parameters of HF's model."""

    def __init__(self, model: Any, stored: Iterable[str]) -> None:
        self._model = model
        self._origins: dict[str, Origin] = {}
        self._modules: dict[str, str] = {}
        expected = dict.fromkeys(model.state_dict(), True)
        rename = _renaming(model, expected)
        for name in sorted(stored, key=_in_order):
            self._note(name, rename, expected)

    def _note(
        self,
        name: str,
        rename: Callable[[str], tuple[str, Any, str | None]],
        expected: Mapping[str, bool],
    ) -> None:
        module, _, part = name.rpartition(".")
        target, converter, pattern = rename(name)
        if target not in expected:
            # A part of a quantized weight is mapped as the weight would be.
            name, part = f"{module}.{WEIGHT}", WEIGHT
            target, converter, pattern = rename(name)
        origin = self._origins.setdefault(target, Origin(converter))
        names = origin.parts.setdefault(pattern or "", [])
        if name not in names:
            names.append(name)
        if converter is None and target.endswith(f".{part}"):
            self._modules[target.removesuffix(f".{part}")] = module

    def module(self, name: str) -> str:
        """Return the checkpoint's name of HF's module `name`; unchanged if it has no tensor."""
        return self._modules.get(name, name)

    def stack(self, name: str) -> str:
        """Return the checkpoint's name of the list of modules that HF's module `name` stacks."""
        for target, origin in self._origins.items():
            if origin.converter is not None and target.startswith(f"{name}."):
                stack, place, *_ = origin.names[0].rsplit(".", 3)
                return stack if place.isdigit() else self.module(name)
        return self.module(name)

    def shards(self, name: str, place: int) -> list[str]:
        """Return the checkpoint's modules whose weights are stacked at a place of a parameter.

        In the order in which they are joined; [] if the checkpoint has them stacked.
        """
        origin = self._origins.get(name)
        patterns = getattr(origin and origin.converter, "source_patterns", ())
        found = [origin.parts.get(pattern, []) for pattern in patterns] if origin else []
        return [names[place].removesuffix(f".{WEIGHT}") for names in found if place < len(names)]

    def within(self, name: str) -> list[str]:
        """Return the checkpoint's modules whose tensors make up HF's module `name`."""
        found = [o for target, o in self._origins.items() if target.startswith(f"{name}.")]
        return [part.rpartition(".")[0] for origin in found for part in origin.names]

    def __contains__(self, name: str) -> bool:
        return self._origin(name) is not None

    def origin_of(self, name: str) -> str | None:
        """Return the tensor of HF's parameter; "" if it has several, None if it has none."""
        origin = self._origin(name)
        if origin is None:
            return None
        return origin.names[0] if origin.converter is None else ""

    def read(self, name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """Return HF's parameter `name`, made of the checkpoint's weights as `read` returns them."""
        origin = self._origin(name)
        if origin is None:
            return read(name)  # which reports it as missing
        if origin.converter is None:
            return read(origin.names[0])
        converter = copy.deepcopy(origin.converter)
        for pattern, names in origin.parts.items():
            converter.collected_tensors[pattern] = [read(part) for part in names]
        first = next(target for target, one in self._origins.items() if one is origin)
        made = converter.convert(first, model=self._model, config=self._model.config)
        values = made[name]
        found: torch.Tensor = values[0] if isinstance(values, list) else values
        return found

    def _origin(self, name: str) -> Origin | None:
        if name in self._origins:
            return self._origins[name]
        # A tensor that is split into several parameters is recorded under the first of them.
        for target, origin in self._origins.items():
            patterns: list[str] = getattr(origin.converter, "target_patterns", [])
            if len(patterns) > 1 and any(
                target.replace(patterns[0], other) == name for other in patterns[1:]
            ):
                return origin
        return None


def _renaming(
    model: Any, expected: Mapping[str, bool]
) -> Callable[[str], tuple[str, Any, str | None]]:
    """Return the function from a tensor's name to its parameter, its converter and its pattern."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:  # transformers 4 keeps parameters as they are stored
        return lambda name: (name, None, None)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = model.base_model_prefix

    def rename(name: str) -> tuple[str, Any, str | None]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        return target, by_pattern.get(pattern), pattern

    return rename


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Return the key that sorts expert 10 after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

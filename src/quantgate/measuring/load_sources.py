"""Which tensors of the file a loaded model's parameters are made of, before kernels repack them.

vLLM fuses q/k/v and gate/up along their outputs, stacks experts, and gives each tensor-parallel
rank a part. Until `process_weights_after_loading`, a parameter otherwise has the file's layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from quantgate.formats.stored import StoredTensors

if TYPE_CHECKING:
    import torch

# An attention layer's own scales: vLLM has them in every model, and few files do.
OF_ATTENTION = re.compile(r"\.[kqv]_(scale|zero_point)$|\.prob_scale$")
# What vLLM loads and never uses, or makes itself.
UNUSED = ("weight_shape", "g_idx_sort_indices")
# The shards of vLLM's stacked experts, by the prefix of their parameters.
EXPERT_SHARDS = {
    "w13_": (("gate_proj", "up_proj"), ("w1", "w3")),
    "w2_": (("down_proj",), ("w2",)),
}
# Models whose files hold each head's keys and values beside its queries; vLLM puts all queries
# before all keys.
GROUPED_BY_HEAD = ("falcon", "bloom", "gpt_neox")
# Models whose files hold weights [in, out].
TRANSPOSED = ("gpt2",)


class Rank(NamedTuple):
    """A tensor-parallel rank, and how many there are."""

    number: int
    ranks: int


@dataclass(frozen=True)
class Piece:
    """A part of a parameter that one tensor of the file fills."""

    parameter: str
    """By its name in vLLM."""
    held: torch.Tensor
    source: str
    """The tensor's name in the file, or, if it has none, the name that it would have."""
    expected: Callable[[], torch.Tensor | None] | None
    """Reads what the file holds of it, in the piece's shape, or None if the shapes do not tell;
    None itself if the file has no such tensor."""


class FileNames:
    """The file's modules, by their names in vLLM."""

    def __init__(self, model: Any, stored: StoredTensors) -> None:
        renamings = _renamings(model)
        self._exact = {_renamed(module, renamings): module for module in stored.modules}
        self._exact |= {module: module for module in stored.modules}
        # A body's prefix may differ: a BERT is `model` in vLLM, and `bert` in the file.
        self._inside: dict[str, str | None] = {}
        for name, module in self._exact.items():
            short = _without_prefix(name)
            same = self._inside.setdefault(short, module) == module
            self._inside[short] = module if same else None

    def module(self, name: str) -> str | None:
        """Return the file's name of vLLM's module `name`; None if the file has no such module."""
        return self._exact.get(name) or self._inside.get(_without_prefix(name))


def _without_prefix(name: str) -> str:
    return name.partition(".")[2] or name


def _renamings(model: Any) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return vLLM's new prefixes and new parts of the file's names."""
    prefixes: dict[str, str] = {}
    parts: dict[str, str] = {}
    for module in model.modules():
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        prefixes |= {k: v for k, v in getattr(mapper, "orig_to_new_prefix", {}).items() if v}
        parts |= {k: v for k, v in getattr(mapper, "orig_to_new_substr", {}).items() if v}
    return prefixes, parts


def _renamed(name: str, renamings: tuple[Mapping[str, str], Mapping[str, str]]) -> str:
    prefixes, parts = renamings
    for old, new in parts.items():
        name = name.replace(old, new, 1)
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


class Sources:
    """What the file holds for each parameter of a model as vLLM has loaded it, on one rank."""

    def __init__(
        self, model: Any, stored: StoredTensors, packed: Mapping[str, Sequence[str]], rank: Rank
    ) -> None:
        self._model, self._stored, self._packed, self._rank = model, stored, packed, rank
        self._names = FileNames(model, stored)
        # vLLM's Transformers backend keeps the file's layout.
        is_own = not type(model).__name__.startswith("Transformers")
        self._model_type = self._config("model_type") if is_own else ""

    def _config(self, key: str) -> Any:
        return getattr(getattr(self._model, "config", None), key, None)

    def pieces(self) -> Iterator[Piece]:
        """Yield the pieces of every parameter; of shared ones, once."""
        seen: set[int] = set()
        for name, module in self._model.named_modules():
            for part, parameter in module.named_parameters(recurse=False):
                full = f"{name}.{part}" if name else part
                wanted = not OF_ATTENTION.search(full) and not part.endswith(UNUSED)
                if wanted and parameter.numel() and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield from self._pieces(name, module, part, parameter)

    def _pieces(self, name: str, module: Any, part: str, parameter: Any) -> Iterator[Piece]:
        for prefix, spellings in EXPERT_SHARDS.items():
            if part.startswith(prefix):
                own = part.removeprefix(prefix)
                yield from self._of_experts(name, module, own, parameter, spellings)
                return
        parent, dot, own = name.rpartition(".")
        shards = [f"{parent}{dot}{shard}" for shard in self._packed.get(own, [own])]
        if len(shards) > 1 and self._names.module(name) is None:
            yield from self._of_shards(shards, module, part, parameter)
        else:
            yield self._of_one(name, module, part, parameter)

    def _of_shards(
        self, shards: Sequence[str], module: Any, part: str, parameter: Any
    ) -> Iterator[Piece]:
        """Yield the shards of a linear that vLLM has fused."""
        held = _cut(parameter, _outputs_of(module, len(shards)))
        for number, shard in enumerate(shards):
            own = None if held is None else held[number]
            yield self._piece(shard, part, parameter if own is None else own, fits=own is not None)

    def _of_one(self, name: str, module: Any, part: str, parameter: Any) -> Piece:
        value = parameter.data
        own = name.rpartition(".")[2]
        if hasattr(module, "shard_indices"):
            return self._of_vocabulary(name, module, part, parameter)
        if self._model_type in TRANSPOSED and value.ndim == 2 and hasattr(module, "output_size"):
            return self._piece(name, part, value, change=lambda found: found.T)
        if self._model_type in GROUPED_BY_HEAD and own == "query_key_value":
            all_heads = getattr(module, "total_num_heads", self._config("num_attention_heads"))
            heads = all_heads, getattr(module, "total_num_kv_heads", all_heads)
            if self._rank.ranks > 1:
                return self._piece(name, part, value, fits=False)
            return self._piece(name, part, value, change=lambda found: _ungrouped(found, *heads))
        sizes = _outputs_of(module, 0)
        if len(sizes) > 1 and self._rank.ranks > 1 and getattr(parameter, "output_dim", None) == 0:
            return self._of_fused_on_disk(name, module, part, value, sizes)
        return self._piece(name, part, value)

    def _of_vocabulary(self, name: str, module: Any, part: str, parameter: Any) -> Piece:
        """Return the rows of an embedding or head that are this rank's; the rest is padding."""
        indices = module.shard_indices
        start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
        if getattr(parameter, "output_dim", None) != 0:
            return self._piece(name, part, parameter.data)
        held = parameter.data[: end - start]
        return self._piece(name, part, held, change=lambda found: found[start : start + len(held)])

    def _of_fused_on_disk(
        self, name: str, module: Any, part: str, value: torch.Tensor, sizes: Sequence[int]
    ) -> Piece:
        """Return this rank's part of a linear that the file, too, has fused."""
        import torch

        replicas = getattr(module, "num_kv_head_replicas", 1)
        counts = [self._rank.ranks // (replicas if place else 1) for place in range(len(sizes))]

        def own(found: torch.Tensor) -> torch.Tensor | None:
            scale = Fraction(len(value), sum(sizes))
            own = [int(size * scale) for size in sizes]
            whole = [size * count for size, count in zip(own, counts, strict=True)]
            if sum(own) != len(value) or sum(whole) != len(found):
                return None
            parts = [
                found_part[self._rank.number * count // self._rank.ranks * size :][:size]
                for found_part, size, count in zip(
                    torch.split(found, whole), own, counts, strict=True
                )
            ]
            return torch.cat(parts)

        return self._piece(name, part, value, change=own)

    def _of_experts(
        self,
        name: str,
        module: Any,
        part: str,
        parameter: Any,
        spellings: Sequence[Sequence[str]],
    ) -> Iterator[Piece]:
        """Yield each expert's shards; experts that the file has stacked are one piece."""
        experts = name.removesuffix(".routed_experts")
        shards = next(
            (s for s in spellings if self._names.module(f"{experts}.0.{s[0]}") is not None), None
        )
        if shards is None:
            yield self._piece(experts, f"*.{part}", parameter.data, fits=False)
            return
        transposed = bool(getattr(parameter, "is_transposed", False))
        for expert, place in _places_of_experts(module, len(parameter)):
            held = parameter.data[place]
            held = held.T if transposed and held.ndim == 2 else held
            cut = _cut_evenly(held, len(shards))
            for number, shard in enumerate(shards):
                yield self._piece(f"{experts}.{expert}.{shard}", part, cut[number])

    def _piece(
        self,
        name: str,
        part: str,
        held: torch.Tensor,
        *,
        fits: bool = True,
        change: Callable[[torch.Tensor], torch.Tensor | None] = lambda found: found,
    ) -> Piece:
        """Return the piece that the file's tensor `part` of vLLM's module `name` fills.

        `change` takes the file's tensor to vLLM's layout.
        """
        full = f"{name}.{part}" if name else part
        module = self._names.module(name)
        source = full if module is None else f"{module}.{part}"
        if source not in self._stored:
            return Piece(full, held, source, None if fits else lambda: None)

        def expected() -> torch.Tensor | None:
            found = change(self._stored.read(source)) if fits else None
            return None if found is None else _share(found, held, self._rank)

        return Piece(full, held, source, expected)


def _outputs_of(module: Any, count: int) -> list[int]:
    """Return the sizes of a linear's fused outputs on this rank."""
    sizes = list(getattr(module, "output_partition_sizes", None) or [1] * count)
    return sizes if not count or len(sizes) == count else []


def _cut(parameter: Any, sizes: Sequence[int]) -> list[torch.Tensor] | None:
    """Cut a fused parameter into its shards; None if its shape does not tell how."""
    value, dim = parameter.data, getattr(parameter, "output_dim", None)
    if dim is None:
        return _cut_evenly(value, len(sizes)) if value.numel() in (1, len(sizes)) else None
    scale = Fraction(value.shape[dim], sum(sizes) or 1)
    own = [size * scale for size in sizes]
    if not own or any(size.denominator != 1 for size in own):
        return None
    return list(value.split([int(size) for size in own], dim=dim))


def _cut_evenly(value: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Cut a tensor into equal shards along its first dimension; a single number is all shards'."""
    return [value] * count if value.numel() == 1 else list(value.chunk(count))


def _places_of_experts(module: Any, count: int) -> list[tuple[int, int]]:
    """Return this rank's experts: the number in the file, and the place among its own."""
    given = getattr(module, "expert_map", None)
    if given is None:
        return [(expert, expert) for expert in range(count)]
    return [(expert, place) for expert, place in enumerate(given.tolist()) if place >= 0]


def _share(found: torch.Tensor, held: torch.Tensor, rank: Rank) -> torch.Tensor | None:
    """Return a rank's even share of a tensor of the file, in the shape of what it holds.

    Where there are fewer shares than ranks, as of KV heads, neighbours hold the same one.
    """
    if found.numel() == 1:
        return found.reshape(-1).repeat(held.numel()).reshape(held.shape)
    if held.ndim != found.ndim:
        return found.reshape(held.shape) if found.numel() == held.numel() else None
    for dim, (whole, own) in enumerate(zip(found.shape, held.shape, strict=True)):
        if whole == own:
            continue
        shares = whole // own
        if whole % own or shares < 2 or rank.ranks % shares:
            return None
        found = found.narrow(dim, rank.number * shares // rank.ranks * own, own)
    return found


def _ungrouped(found: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Put all queries before all keys before all values [(heads + 2 kv_heads) x width, ...]."""
    import torch

    groups = found.reshape(kv_heads, heads // kv_heads + 2, -1, *found.shape[1:])
    parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
    return torch.cat([part.reshape(-1, *found.shape[1:]) for part in parts])


def packed_linears(model: Any) -> dict[str, list[str]]:
    """Return which of a checkpoint's linears each vLLM linear holds, by last name component."""
    # The body may declare its packed modules where the model with its head does not.
    modules = list(reversed(list(model.modules())))
    packed: dict[str, list[str]] = {}
    for module in modules:
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        stacked: dict[str, list[str]] = {}
        for part, (new, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
            stacked.setdefault(new.rpartition(".")[2], []).append(part.rpartition(".")[2])
        packed |= stacked
    for module in modules:
        packed |= getattr(module, "packed_modules_mapping", None) or {}  # vLLM 0.26: None
    return packed

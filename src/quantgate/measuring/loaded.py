"""The load audit: was every parameter of a loaded model in the file, and loaded unchanged?

vLLM does not notice every missing tensor: a norm without one keeps its initial values. Its own
tracker skips whole modules that process their weights after loading (vllm#57108). The worker
describes each parameter; the comparison with the file is a pure function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.errors import printable
from quantgate.formats.stored import StoredTensors

if TYPE_CHECKING:
    import torch

# Most elements of a parameter that is compared with the file bit for bit: norms and biases.
SMALL = 1 << 16
WHOLE = frozenset(("weight", "bias"))
# vLLM's fused experts hold many modules under their own names.
EXPERTS = ".experts."
# Attention scales, by their names in vLLM.
KV_SCALES = {"_k_scale": "k_scale", "_v_scale": "v_scale"}


@dataclass(frozen=True)
class LoadProblem:
    """A loaded parameter that differs from the file."""

    name: str
    value: str
    expected: str

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.value}; expected {self.expected}")


def parameters_of(model: Any, packed: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Describe each parameter of a loaded model, inside vLLM's worker.

    `packed` says which of the file's linears each fused one holds, by their own names.
    By name: the file's modules that it was made of, its dtype, whether it is finite and, if it is
    small, the sha256 of its bytes.
    """
    found = {n: _described(n, p.data, packed) for n, p in model.named_parameters() if p.numel()}
    for name, module in model.named_modules():
        for own, part in KV_SCALES.items():
            scale = getattr(module, own, None)
            if scale is not None and getattr(scale, "numel", int)() == 1:
                attention = name.removesuffix(".attn")
                found[f"{attention}.{part}"] = {"kv_scale": float(scale)}
    return found


def _described(name: str, value: torch.Tensor, packed: Mapping[str, list[str]]) -> dict[str, Any]:
    import torch

    module, _, _ = name.rpartition(".")
    parent, dot, own = module.rpartition(".")
    bytes_ = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    floats = value.is_floating_point() and value.element_size() > 1
    return {
        "sources": [f"{parent}{dot}{shard}" for shard in packed.get(own, [own])],
        "dtype": str(value.dtype).removeprefix("torch."),
        "count": value.numel(),
        "finite": bool(torch.isfinite(value).all()) if floats else True,
        "sha256": hashlib.sha256(bytes_.numpy().tobytes()).hexdigest()
        if value.numel() <= SMALL
        else "",
    }


def problems_of(
    parameters: Mapping[str, Mapping[str, Any]], directory: Path
) -> tuple[LoadProblem, ...]:
    """Return where a loaded model differs from the file, by name; for a single rank."""
    stored = StoredTensors(directory)
    # A BERT is `model` in vLLM, and `bert` in the file.
    modules = {_inside(module): module for module in stored.modules}
    return tuple(
        problem
        for name, said in parameters.items()
        for problem in _problems(name, said, stored, modules)
    )


def _problems(
    name: str, said: Mapping[str, Any], stored: StoredTensors, modules: Mapping[str, str]
) -> Iterator[LoadProblem]:
    if "kv_scale" in said:
        yield from _kv_problems(name, float(said["kv_scale"]), stored)
        return
    if EXPERTS in name:
        return
    if not said["finite"]:
        yield LoadProblem(name, "is not finite after loading", "finite values")
    for source in said["sources"]:
        if _inside(source) not in modules:
            yield LoadProblem(source, "was loaded from no tensor", f"one in the file, for {name}")
            return
    part = name.rpartition(".")[2]
    owners = [modules[_inside(source)] for source in said["sources"]]
    # A quantized weight is repacked on loading; replay judges what it computes.
    is_whole = all(WHOLE.issuperset(stored.parts_of(owner)) for owner in owners)
    sources = [f"{owner}.{part}" for owner in owners]
    if said["sha256"] and is_whole and all(source in stored for source in sources):
        if _digest(stored, sources, said["dtype"]) != said["sha256"]:
            yield LoadProblem(
                name, "is not what the file holds", f"the file's {', '.join(sources)}"
            )


def _kv_problems(name: str, value: float, stored: StoredTensors) -> Iterator[LoadProblem]:
    if name in stored:
        on_disk = float(stored.read(name).float().max())
        if value != on_disk:
            yield LoadProblem(name, f"{value:g} is in use", f"{on_disk:g}, the file's")


def _digest(stored: StoredTensors, sources: list[str], dtype: str) -> str:
    import torch

    tensors = [stored.read(source) for source in sources]
    whole = torch.cat([tensor.to(getattr(torch, dtype)).reshape(-1) for tensor in tensors])
    return hashlib.sha256(whole.view(torch.uint8).numpy().tobytes()).hexdigest()


def _inside(name: str) -> str:
    return name.partition(".")[2] or name

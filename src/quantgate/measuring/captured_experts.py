"""Captures of experts: what a layer's experts were given, which were chosen, and what they gave.

`watch_experts` runs inside a vLLM worker; `SeenExperts` is what is read back, ranks joined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What is recorded of every mixture of experts, and of emulated ones.
PARTS = ("x", "ids", "weights", "output")
PRODUCTS = ("gate_up", "activated", "down")
ROUTED = ".routed_experts"

Record = Callable[[str, "torch.Tensor"], None]


@dataclass(frozen=True)
class SeenExperts:
    """A layer's experts in one window."""

    x: torch.Tensor
    """[tokens, H]."""
    ids: torch.Tensor
    """The experts of each token [tokens, k]."""
    weights: torch.Tensor
    """[tokens, k]; the scaling factor of the routed experts included."""
    output: torch.Tensor
    """[tokens, H]; likewise."""
    products: Mapping[str, torch.Tensor]
    """Of emulated experts, as `emulated_experts.Products`; {} of others."""

    def of_expert(self, expert: int, part: str) -> torch.Tensor:
        """Return the rows [n, width] of one expert's product, in the order of HF's forward."""
        import torch

        slots, tokens = torch.where(self.ids.T == expert)
        return self.products[part][tokens, slots]


def experts_of(model: Any) -> dict[str, Any]:
    """Return the modules of a vLLM model that hold routed experts, by the name of their layer."""
    return {
        name.removesuffix(ROUTED): module
        for name, module in model.named_modules()
        if hasattr(module, "forward_modular")
    }


def watch_experts(model: Any, record: Record) -> Callable[[], None]:
    """Record what a model's experts compute, by "<name>.<part>"; return how to stop."""
    experts = experts_of(model)
    for name, module in experts.items():
        factor = float(getattr(model.get_submodule(name), "routed_scaling_factor", 1.0))
        module.forward_modular = functools.partial(
            _forward, module.forward_modular, functools.partial(_record, record, name), factor
        )
        if hasattr(module.quant_method, "watch"):
            module.quant_method.watch = functools.partial(_record_products, record, name)

    def stop() -> None:
        for module in experts.values():
            del module.forward_modular
            if hasattr(module.quant_method, "watch"):
                module.quant_method.watch = None

    return stop


def _forward(
    stock: Any,
    record: Callable[..., None],
    factor: float,
    x: Any,
    topk_weights: Any,
    topk_ids: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    given = x.clone()  # kernels may compute in place
    output = stock(x, topk_weights, topk_ids, *args, **kwargs)
    record(given, topk_ids, topk_weights * factor, output * factor)
    return output


def _record(record: Record, name: str, *values: Any) -> None:
    for part, value in zip(PARTS, values, strict=True):
        record(f"{name}.{part}", value)


def _record_products(record: Record, name: str, products: Any) -> None:
    for part, value in products.seen.items():
        record(f"{name}.{part}", value)


def joined(ranks: Sequence[Mapping[str, torch.Tensor]]) -> SeenExperts:
    """Join what tensor-parallel ranks saw: each has a part of every expert's intermediate size."""
    import torch

    first = ranks[0]

    def summed(part: str) -> torch.Tensor:
        return torch.stack([rank[part] for rank in ranks]).sum(0)

    products = {}
    if PRODUCTS[0] in first:
        halves = [torch.chunk(rank["gate_up"], 2, dim=2) for rank in ranks]
        products = {
            "gate_up": torch.cat([part for half in zip(*halves, strict=True) for part in half], 2),
            "activated": torch.cat([rank["activated"] for rank in ranks], 2),
            "down": summed("down"),
        }
    return SeenExperts(first["x"], first["ids"], first["weights"], summed("output"), products)

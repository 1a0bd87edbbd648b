"""Mixtures of experts in HF's models: the modules that hold them, and their products, one by one.

transformers stacks a layer's experts in parameters [experts, out, in] of one module, which is
called with each token's experts and their weights. Its own forward runs here; only the products
inside it are computed by an engine's rules, and can be watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from quantgate.formats.linear import Quantizer
    from quantgate.measuring.expert_products import Each, Product

# Returns experts' output [tokens, H] for x [tokens, H], ids and weights, both [tokens, k].
Compute = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor", "Each | None"], "torch.Tensor"]


@dataclass(frozen=True)
class ExpertsCall:
    """One call of a layer's experts."""

    name: str
    """Their module's name in the checkpoint."""
    x: torch.Tensor
    """[tokens, H]."""
    ids: torch.Tensor
    """The experts of each token [tokens, k]."""
    weights: torch.Tensor
    """[tokens, k]."""
    count: int
    """How many experts the layer has."""
    compute: Compute
    """Returns the experts' output [tokens, H] for other x, ids and weights."""
    shards: Callable[[int, int], list[str]]
    """Returns the checkpoint's linears that one product is fused of, by its place and expert."""


WatchExperts = Callable[[ExpertsCall], "torch.Tensor"]


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds stacked experts, and is called with x, ids and weights."""
    stacks = [stack for stack in stacks_of(module).values() if stack.ndim == 3]
    return len(stacks) == 2 and len(inspect.signature(type(module).forward).parameters) == 4


def stacks_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the weights that a module multiplies by: all of its own but biases and the like."""
    own = dict(module.named_parameters(recurse=False))
    most = max((parameter.ndim for parameter in own.values()), default=0)
    return {name: parameter for name, parameter in own.items() if parameter.ndim == most}


def is_router(module: torch.nn.Module) -> bool:
    """Whether a module chooses experts: it is called with x alone, and multiplies it itself."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return (
        weight is not None
        and weight.ndim == 2
        and not type(module).__module__.startswith("torch.")
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def compute_experts(
    module: torch.nn.Module,
    quantize: Quantizer | None,
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Compute], torch.Tensor],
) -> None:
    """Replace the forward of stacked experts by `call`, given x, ids, weights and how to compute.

    Their products are computed by rule.
    """
    from quantgate.measuring.expert_products import Products

    signature = inspect.signature(type(module).forward)

    def compute(
        x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, each: Each | None
    ) -> torch.Tensor:
        stacks = stacks_of(module)
        same = all(stack.dtype == x.dtype for stack in stacks.values())
        by_rule = quantize is not None or each is not None or not same
        with Products(stacks, quantize, each) if by_rule else nullcontext():
            found: torch.Tensor = type(module).forward(module, x, ids, weights)
        return found

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        _, x, ids, weights = signature.bind(module, *arguments, **named).args
        return call(x, ids, weights, compute)

    module.forward = forward


def watch_router(
    module: torch.nn.Module,
    name: str,
    watch: Callable[[str, torch.Tensor, Product], torch.Tensor],
) -> None:
    """Have the watch called for a router's product, as for a linear's."""

    from quantgate.measuring.expert_products import Products

    def forward(*arguments: Any, **named: Any) -> Any:
        with Products(
            stacks_of(module), None, lambda _, __, rows, product: watch(name, rows, product)
        ):
            return type(module).forward(module, *arguments, **named)

    module.forward = forward

"""The products inside a module of HF's that multiplies its own parameters, taken one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from quantgate.formats.linear import Quantizer

Product = Callable[[torch.Tensor], torch.Tensor]
# Called for each product of an expert with its place among the two, the expert's number, the input
# [rows, in] and the product as a function of an input; returns the output [rows, out].
Each = Callable[[int, int, torch.Tensor, Product], torch.Tensor]

MULTIPLY = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Within this, products with a module's own parameters are computed by rule, and watched."""

    def __init__(
        self,
        stacks: Mapping[str, torch.Tensor],
        quantize: Quantizer | None,
        each: Each | None,
    ) -> None:
        super().__init__()
        self._own = {
            stack.untyped_storage().data_ptr(): (place, stack)
            for place, stack in enumerate(stacks.values())
        }
        self._quantize, self._each = quantize, each

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in MULTIPLY or len(args) < 2 or (found := self._of(args[1])) is None:
            return func(*args, **(kwargs or {}))
        rows, weight, *bias = args

        def product(x: torch.Tensor) -> torch.Tensor:
            values = (x if self._quantize is None else self._quantize(x)).to(weight.dtype)
            result: torch.Tensor = func(values, weight, *bias, **(kwargs or {}))
            return result.to(x.dtype)

        return product(rows) if self._each is None else self._each(*found, rows, product)

    def _of(self, weight: torch.Tensor) -> tuple[int, int] | None:
        """Return the place of the stack that a weight is part of, and its own in that."""
        found = self._own.get(weight.untyped_storage().data_ptr())
        if found is None:
            return None
        place, stack = found
        return place, weight.storage_offset() // stack.stride(0) if stack.ndim == 3 else 0

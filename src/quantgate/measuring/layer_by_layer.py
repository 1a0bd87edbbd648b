"""HF's own forward of a model's body, stopped at a layer: what that layer is called with.

Nothing is known here of any architecture. What precedes the layers, what lies between them and what
follows them is whatever HF's forward does; the layers alone are run apart, so that one at a time
needs its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Call = tuple[tuple[Any, ...], dict[str, Any]]


def layers_of(body: torch.nn.Module) -> torch.nn.ModuleList | None:
    """Return the longest list of modules that is in no other list; None where there is none.

    A list within a list is a layer's experts, say.
    """
    import torch

    lists = {n: m for n, m in body.named_modules() if isinstance(m, torch.nn.ModuleList)}
    outermost = [
        found
        for name, found in lists.items()
        if not any(name.startswith(f"{other}.") for other in lists if other != name)
    ]
    return max(outermost, key=len, default=None)


class _Reached(Exception):
    """A layer was called that has not been computed yet."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class OutOfOrder(Exception):
    """A body calls its layers otherwise than once each, in the order in which it holds them."""


@dataclass
class Pass:
    """One run of a body over a batch of windows, taken layer by layer."""

    layers: torch.nn.ModuleList
    forward: Callable[[], Any]
    """HF's forward of the body on these windows; what it returns has `last_hidden_state`."""
    output: Any = None
    """What the layer before gave back, as it gave it."""

    def next_call(self, index: int) -> Call:
        """Return what layer `index` is called with, once those before it have been run."""
        try:
            with self._standing_in(stop_at=index):
                self.forward()
        except _Reached as reached:
            return reached.call
        raise OutOfOrder(f"layer {index} is not called")

    def last_hidden(self) -> torch.Tensor:
        """Return what follows from the last layer's output."""
        with self._standing_in(stop_at=len(self.layers)):
            found: torch.Tensor = self.forward().last_hidden_state
        return found

    @contextmanager
    def _standing_in(self, stop_at: int) -> Iterator[None]:
        """Let every layer give back the last one's output: of those before, nothing else is used.

        A layer's input is what the layer before it gave, whatever HF does in between.
        """
        called = 0

        def forward_of(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **named: Any) -> Any:
                nonlocal called
                if index != called:
                    raise OutOfOrder(f"layer {index} is called in place of layer {called}")
                called += 1
                if index == stop_at:
                    raise _Reached((arguments, named))
                return self.output

            return forward

        for index, layer in enumerate(self.layers):
            layer.forward = forward_of(index)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

"""HF's own forward of a model's body, stopped at a layer: what that layer is called with.

This module knows no architecture. Everything before, between and after the layers is done by HF's
own forward; only the layers are run separately, so that one at a time needs its weights.
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
    """Return the longest module list that is inside no other list; None if there is none.

    A list inside a list is, for example, a layer's experts.
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
    """A layer was called whose output has not been computed yet."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


class OutOfOrder(Exception):
    """A body does not call each of its layers exactly once, in their stored order."""


@dataclass
class Pass:
    """One run of a body over a batch of windows, taken layer by layer."""

    layers: torch.nn.ModuleList
    forward: Callable[[], Any]
    """HF's forward of the body on these windows; its result has `last_hidden_state`."""
    output: Any = None
    """The previous layer's output, unchanged."""

    def next_call(self, index: int) -> Call:
        """Return the arguments of layer `index`, once the layers before it have been run."""
        try:
            with self._standing_in(stop_at=index):
                self.forward()
        except _Reached as reached:
            return reached.call
        raise OutOfOrder(f"layer {index} is not called")

    def last_hidden(self) -> torch.Tensor:
        """Return the body's last hidden state, computed from the last layer's output."""
        with self._standing_in(stop_at=len(self.layers)):
            found: torch.Tensor = self.forward().last_hidden_state
        return found

    @contextmanager
    def _standing_in(self, stop_at: int) -> Iterator[None]:
        """Have every layer return the output of the last one computed; earlier ones are not needed.

        A layer's input depends only on the previous layer's output and on what HF does in between.
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

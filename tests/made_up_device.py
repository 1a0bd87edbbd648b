"""A second device without one: its tensors hold their values on the CPU, and do not mix with it.

A tensor there says that it is on `DEVICE`, one of torch's own names, and every operation on it is
computed by the CPU, so results are the CPU's bit for bit. An operation on tensors of both is an
error, as it is on a GPU: that is what a forgotten transfer looks like. It shows nothing of a GPU's
arithmetic, memory or streams.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

BACKEND = "privateuseone"
DEVICE = f"{BACKEND}:0"
# What takes a tensor of one device to another.
TRANSFERS = ("aten::to", "aten::_to_copy", "aten::copy_")


class There(torch.Tensor):
    """A tensor on the made-up device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device(DEVICE),
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise RuntimeError(f"{func}: a tensor of the made-up device outlived it")


class _Rules(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes on the CPU what is done on the made-up device, and refuses to mix the two."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given, _ = tree_flatten((args, kwargs or {}))
        there = [x for x in given if isinstance(x, There)]
        here = [x for x in given if isinstance(x, torch.Tensor) and not isinstance(x, There)]
        target = next((x for x in given if isinstance(x, torch.device)), None)
        if there and any(x.ndim for x in here) and func._schema.name not in TRANSFERS:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        done = _on_cpu(func, tree_map(_to_cpu, args), tree_map(_to_cpu, kwargs or {}))
        if not (there if target is None else target.type == BACKEND):
            return done
        known = {id(x.held): x for x in there}  # what works in place returns what it was given
        return tree_map(
            lambda x: known.get(id(x), There(x)) if type(x) is torch.Tensor else x, done
        )


def _on_cpu(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func is torch.ops.aten.histc.default:  # of integers there is one on GPUs alone
        return func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


def _to_cpu(given: Any) -> Any:
    if isinstance(given, There):
        return given.held
    is_there = isinstance(given, torch.device) and given.type == BACKEND
    return torch.device("cpu") if is_there else given


@functools.cache
def _register() -> None:
    from torch.utils import backend_registration as registration

    class Hook(registration._DummyPrivateUse1Hook):
        def is_available(self) -> bool:  # to nobody who does not ask for it by name
            return False

    registration._setup_privateuseone_for_python_backend(hook=Hook())


@contextmanager
def made_up_device() -> Iterator[None]:
    """Have the device within, and no gradients: torch follows views of none of its tensors."""
    _register()
    # `torch.tensor(…, device=…)` is then made on the CPU and moved, as torch's own made-up ones do.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with torch.inference_mode(), _Rules():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)

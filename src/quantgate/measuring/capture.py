"""Captures: what every linear of a loaded model was given and gave back, for a few windows.

`WorkerExtension` runs inside vLLM's worker, in process or not, one for each tensor-parallel rank,
and writes what its rank saw; `Capture` puts the ranks together again, under the names that a
checkpoint uses: vLLM's `qkv_proj` is `q_proj`, `k_proj` and `v_proj` there.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.measuring.loaded import parameters_of
from quantgate.patches.emulation import EMULATED_KV_SCALES, EMULATED_LINEAR, is_emulated

if TYPE_CHECKING:
    import torch

EXTENSION = "quantgate.measuring.capture.WorkerExtension"
# Where vLLM keeps its linear kernels; a class that derives from one of them is one.
KERNEL_MODULES = "vllm.model_executor.kernels."
EMULATED_KV_CACHE = "EmulatedFp8KVCache"


class WorkerExtension:
    """Methods that vLLM adds to its worker; called by name, so that nothing is pickled."""

    def quantgate_kernels(self) -> dict[str, list[str]]:
        """Return what computes each module, by name: kernel classes, emulated ones marked `*`."""
        return {
            name: kernels
            for name, module in self.get_model().named_modules()  # type: ignore[attr-defined]
            if (kernels := _kernels_of(module))
        }

    def quantgate_parameters(self) -> dict[str, dict[str, Any]]:
        """Return what each parameter is, after loading; `loaded.py` holds it against the file."""
        return parameters_of(self.get_model())  # type: ignore[attr-defined]

    def quantgate_start_capture(self) -> None:
        """Watch every linear from now on."""
        self._quantgate_capture = _Watch(self.get_model())  # type: ignore[attr-defined]

    def quantgate_save_capture(self, directory: str, window: int) -> None:
        """Write what was seen since the last call as `directory`/<window>.<rank>.safetensors."""
        rank = self.rank  # type: ignore[attr-defined]
        self._quantgate_capture.save(Path(directory) / f"{window}.{rank}.safetensors")

    def quantgate_stop_capture(self) -> None:
        """Watch no longer."""
        self._quantgate_capture.stop()
        del self._quantgate_capture


def _kernels_of(module: Any) -> list[str]:
    """Return the names of what computes a layer, read from the objects that it holds."""
    if (attention := getattr(module, "impl", None)) is not None:
        emulated_cache = [f"{EMULATED_KV_CACHE}*"] if hasattr(module, EMULATED_KV_SCALES) else []
        return [type(attention).__name__, *emulated_cache]
    method = getattr(module, "quant_method", None)
    if method is None:
        return []
    scheme = getattr(module, "scheme", None) or method
    kernels = [held for held in vars(scheme).values() if _is_kernel(held)] or [scheme]
    emulated = hasattr(module, EMULATED_LINEAR)
    return [type(k).__name__ + "*" * (emulated or is_emulated(k)) for k in kernels]


def _is_kernel(held: object) -> bool:
    return any(base.__module__.startswith(KERNEL_MODULES) for base in type(held).__mro__)


class _Watch:
    """Forward hooks on a model's linears, and what they saw."""

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.layers.linear import LinearBase

        # The body may know what is packed when the model with its head does not.
        packed: dict[str, list[str]] = {}
        for module in reversed(list(model.modules())):
            packed |= getattr(module, "packed_modules_mapping", None) or {}  # vLLM 0.26: None
        linears = {n: m for n, m in model.named_modules() if isinstance(m, LinearBase)}
        self.layouts = {name: _layout(name, module, packed) for name, module in linears.items()}
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.handles = [
            module.register_forward_hook(functools.partial(self._hook, name))
            for name, module in linears.items()
        ]

    def _hook(self, name: str, _: Any, inputs: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        for kind, tensor in (("input", inputs[0]), ("output", result)):
            # A copy: vLLM reuses its buffers, and norms are computed in place.
            self.seen.setdefault(f"{name}.{kind}", []).append(tensor.detach().cpu().clone())

    def save(self, path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        whole = {name: torch.cat(parts) for name, parts in self.seen.items()}
        save_file(whole, path, {"layouts": json.dumps(self.layouts)})
        self.seen.clear()

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()


def _layout(name: str, module: Any, packed: Mapping[str, list[str]]) -> dict[str, Any]:
    """Return which of a checkpoint's linears a module holds, and how ranks share them."""
    parent, dot, own = name.rpartition(".")
    shards = [f"{parent}{dot}{shard}" for shard in packed.get(own, [own])]
    sizes = list(getattr(module, "output_partition_sizes", None) or [module.output_size])
    if len(sizes) != len(shards):
        sizes, shards = [sum(sizes)], [name]
    replicas = getattr(module, "num_kv_head_replicas", 1)
    return {
        "shards": dict(zip(shards, sizes, strict=True)),
        "ranks_split": _what_ranks_split(module),
        # Several ranks hold the same heads of keys and values.
        "replicas": [1, *([replicas] * (len(shards) - 1))] if replicas > 1 else [1] * len(shards),
    }


def _what_ranks_split(module: Any) -> str:
    """Return which side of a linear each tensor-parallel rank has a part of, if any."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    if module.tp_size > 1:
        if isinstance(module, ColumnParallelLinear) and not module.gather_output:
            return "output"
        if isinstance(module, RowParallelLinear):
            return "input" if module.input_is_parallel else "nothing"
    return "nothing"


@dataclass(frozen=True)
class Seen:
    """One linear's input [tokens, in] and output [tokens, out] in one window, all ranks joined."""

    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Capture:
    """The captured windows of one engine, read from disk one linear at a time."""

    directory: Path
    windows: tuple[int, ...]
    """Indices into the probe's windows."""
    values: NDArray[np.floating[Any]]
    """What a measurement holds, of these windows' scored tokens, served one by one [m] or [m, D].

    Where inputs are quantized, a window in a batch gets other last bits, so other codes and values.
    """

    def seen(self, name: str, window: int) -> Seen:
        """Return what the engine's linear `name` saw in a window."""
        import torch

        module, offset, size, layout = self._places[_inside(name)]
        inputs = [_read(path, f"{module}.input") for path in self._ranks(window)]
        outputs = [
            _read(path, f"{module}.output")[:, offset : offset + size]
            for path in self._ranks(window)
        ]
        if layout["ranks_split"] == "input":
            return Seen(torch.cat(inputs, dim=1), outputs[0])
        if layout["ranks_split"] == "output":
            shards = [_inside(shard) for shard in layout["shards"]]
            replicas = layout["replicas"][shards.index(_inside(name))]
            return Seen(inputs[0], torch.cat(outputs[::replicas], dim=1))
        return Seen(inputs[0], outputs[0])

    def _ranks(self, window: int) -> list[Path]:
        files = self.directory.glob(f"{window}.*.safetensors")
        return sorted(files, key=lambda path: int(path.name.split(".")[1]))

    def __contains__(self, name: str) -> bool:
        return _inside(name) in self._places

    def module_of(self, name: str) -> str:
        """Return the module of vLLM's that holds the linear `name`."""
        return self._places[_inside(name)][0]

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, int, int, dict[str, Any]]]:
        from safetensors import safe_open

        first = min(self.directory.glob("*.safetensors"))
        with safe_open(first, framework="pt") as stream:
            layouts = json.loads(stream.metadata()["layouts"])
        places = {}
        for module, layout in layouts.items():
            offset = 0
            for shard, size in layout["shards"].items():
                places[_inside(shard)] = (module, offset, size, layout)
                offset += size
        return places


def _inside(name: str) -> str:
    """Return a module's name inside the body: a BERT is `model` in vLLM, and `bert` to others."""
    return name.partition(".")[2] or name


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        tensor: torch.Tensor = stream.get_tensor(name)
        return tensor


def take_capture(
    llm: Any,
    directory: Path,
    windows: Sequence[int],
    serve_alone: Callable[[int], NDArray[np.floating[Any]]],
) -> Capture:
    """Serve each window by itself, and return what every linear saw and what came of it.

    `serve_alone` gives the values of the probe's window with an index. The engine must be eager:
    nothing calls a module's hooks under CUDA graphs or `torch.compile`.
    """
    values = []
    llm.collective_rpc("quantgate_start_capture")
    for index in windows:
        values.append(serve_alone(index))
        llm.collective_rpc("quantgate_save_capture", args=(str(directory), index))
    llm.collective_rpc("quantgate_stop_capture")
    return Capture(directory, tuple(windows), np.concatenate(values))

"""Captures: the input and output of every linear of a loaded model, for a few windows.

`WorkerExtension` runs inside each vLLM worker, one per tensor-parallel rank, in process or not, and
writes what its rank saw. `Capture` joins the ranks and uses the checkpoint's names: vLLM's
`qkv_proj` is its `q_proj`, `k_proj` and `v_proj`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.formats.kernels import INT8_INPUTS
from quantgate.measuring.captured_experts import (
    PARTS,
    PRODUCTS,
    ROUTED,
    SeenExperts,
    experts_of,
    joined,
    watch_experts,
)
from quantgate.measuring.load_sources import packed_linears
from quantgate.measuring.loaded import audit_of
from quantgate.patches.pooling_api import REPAIRED_HEAD
from quantgate.patches.wanted import EMULATED_KV_SCALES, EMULATED_LINEAR, is_emulated

if TYPE_CHECKING:
    import torch

EXTENSION = "quantgate.measuring.capture.WorkerExtension"
# Where vLLM keeps its linear kernels; a subclass of one of these counts as a kernel.
KERNEL_MODULES = "vllm.model_executor.kernels."
EMULATED_KV_CACHE = "EmulatedFp8KVCache"


class WorkerExtension:
    """Methods that vLLM adds to its worker; called by name, so nothing is pickled."""

    def quantgate_kernels(self) -> dict[str, list[str]]:
        """Return each module's kernel classes by module name, emulations marked `*`."""
        return {
            name: kernels
            for name, module in self.get_model().named_modules()  # type: ignore[attr-defined]
            if (kernels := _kernels_of(module))
        }

    def quantgate_repaired(self) -> list[str]:
        """Return the names of the heads that unpatched vLLM would have loaded wrong."""
        modules = self.get_model().named_modules()  # type: ignore[attr-defined]
        return [name for name, module in modules if hasattr(module, REPAIRED_HEAD)]

    def quantgate_load_audit(self) -> dict[str, Any] | None:
        """Return a `LoadAudit` as JSON types; None if the engine was not asked to watch."""
        return audit_of(self.get_model())  # type: ignore[attr-defined]

    def quantgate_start_capture(self) -> None:
        """Start recording every linear."""
        self._quantgate_capture = _Watch(self.get_model())  # type: ignore[attr-defined]

    def quantgate_save_capture(self, directory: str, window: int) -> None:
        """Write what was recorded since the last call: `directory`/<window>.<rank>.safetensors."""
        rank = self.rank  # type: ignore[attr-defined]
        self._quantgate_capture.save(Path(directory) / f"{window}.{rank}.safetensors")

    def quantgate_stop_capture(self) -> None:
        """Stop recording."""
        self._quantgate_capture.stop()
        del self._quantgate_capture


def _kernels_of(module: Any) -> list[str]:
    """Return the names of a layer's kernels, read from the objects that it holds."""
    if (attention := getattr(module, "impl", None)) is not None:
        emulated_cache = [f"{EMULATED_KV_CACHE}*"] if hasattr(module, EMULATED_KV_SCALES) else []
        return [type(attention).__name__, *emulated_cache]
    method = getattr(module, "quant_method", None)
    if method is None:
        return []
    scheme = getattr(module, "scheme", None) or method
    kernels = [held for held in vars(scheme).values() if _is_kernel(held)] or [scheme]
    emulated = hasattr(module, EMULATED_LINEAR)
    return [
        type(k).__name__ + INT8_INPUTS * _quantizes_to_int8(k, module)
        + "*" * (emulated or is_emulated(k))
        for k in kernels
    ]  # fmt: skip


def _quantizes_to_int8(kernel: Any, module: Any) -> bool:
    """Whether vLLM's CPU kernel quantizes inputs to int8 against the format: with AMX it may.

    Of integer weights 16-bit inputs (`use_w4a8`), and static int8 inputs by a token's own scale.
    """
    if getattr(module, "use_w4a8", False):
        return True
    applied = getattr(getattr(kernel, "linear_method", None), "__name__", "")
    config = getattr(kernel, "config", None)
    return applied == "_apply_weights_sgl" and getattr(config, "is_static_input_scheme", False)


def _is_kernel(held: object) -> bool:
    return any(base.__module__.startswith(KERNEL_MODULES) for base in type(held).__mro__)


class _Watch:
    """Hooks on a model's linears and experts, and what they recorded."""

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.layers.linear import LinearBase

        packed = packed_linears(model)
        linears = {n: m for n, m in model.named_modules() if isinstance(m, LinearBase)}
        model_type = getattr(getattr(model, "config", None), "model_type", "")
        self.layouts = {n: _layout(n, m, packed, model_type) for n, m in linears.items()}
        self.renamed = _renamed(model)
        self.experts = list(experts_of(model))
        self.seen: dict[str, list[torch.Tensor]] = {}
        self.handles = [
            module.register_forward_hook(functools.partial(self._hook, name))
            for name, module in linears.items()
        ]
        self._stop_experts = watch_experts(model, self._record)

    def _record(self, name: str, values: torch.Tensor) -> None:
        self.seen.setdefault(name, []).append(values.detach().cpu().clone())

    def _hook(self, name: str, _: Any, inputs: tuple[Any, ...], output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        for kind, tensor in (("input", inputs[0]), ("output", result)):
            # A copy: vLLM reuses its buffers and computes norms in place. Its Transformers backend
            # adds a batch dimension of one.
            self._record(f"{name}.{kind}", tensor.reshape(-1, tensor.shape[-1]))

    def save(self, path: Path) -> None:
        import torch
        from safetensors.torch import save_file

        whole = {name: torch.cat(parts) for name, parts in self.seen.items()}
        more = {"layouts": self.layouts, "renamed": self.renamed, "experts": self.experts}
        save_file(whole, path, {name: json.dumps(value) for name, value in more.items()})
        self.seen.clear()

    def stop(self) -> None:
        self._stop_experts()
        for handle in self.handles:
            handle.remove()


def _layout(
    name: str, module: Any, packed: Mapping[str, list[str]], model_type: str
) -> dict[str, Any]:
    """Return which of a checkpoint's linears a module holds, and how ranks share them.

    Each linear owns some columns of a rank's output: one run of them or, where the checkpoint
    stores q, k and v or gate and up in one linear, several.
    """
    parent, dot, own = name.rpartition(".")
    shards = [f"{parent}{dot}{shard}" for shard in packed.get(own, [own])]
    sizes = list(getattr(module, "output_partition_sizes", None) or [module.output_size])
    replicas = getattr(module, "num_kv_head_replicas", 1)
    # Several ranks hold the same KV heads.
    runs = [[size, replicas if place else 1] for place, size in enumerate(sizes)]
    held = [[run] for run in runs] if len(runs) == len(shards) else [runs]
    names = shards if len(runs) == len(shards) else [name]
    return {
        "shards": dict(zip(names, held, strict=True)),
        "ranks_split": _what_ranks_split(module),
        "heads": _grouped_heads(own, module, model_type),
    }


def _grouped_heads(own: str, module: Any, model_type: str) -> list[int] | None:
    """Return the numbers of query and KV heads of a linear that groups q, k and v by head.

    These checkpoints store each head's keys and values beside its queries, and vLLM reorders them
    on loading: all queries, all keys, all values (`load_weights` of falcon.py and bloom.py).
    """
    if own != "query_key_value" or model_type not in ("falcon", "bloom"):
        return None
    return [module.total_num_heads, module.total_num_kv_heads]


def _what_ranks_split(module: Any) -> str:
    """Return which side of a linear is split across tensor-parallel ranks, if any."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    if module.tp_size > 1:
        if isinstance(module, ColumnParallelLinear) and not module.gather_output:
            return "output"
        if isinstance(module, RowParallelLinear):
            return "input" if module.input_is_parallel else "nothing"
    return "nothing"


@dataclass(frozen=True)
class Seen:
    """One linear's input [tokens, in] and output [tokens, out] in one window, ranks joined."""

    input: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class Capture:
    """The captured windows of one engine, read from disk one linear at a time."""

    directory: Path
    windows: tuple[int, ...]
    """Indices into the probe's windows."""
    values: NDArray[np.floating[Any]]
    """The values of these windows' scored tokens, served one window at a time, [m] or [m, D].

    Batching changes last bits and, where inputs are quantized, therefore codes and values.
    """

    def seen(self, name: str, window: int) -> Seen:
        """Return the input and output of the engine's linear `name` in a window."""
        import torch

        module, runs, layout = self._places[self._inside(name, self._places)]
        inputs = [_read(path, f"{module}.input") for path in self._ranks(window)]
        outputs = [_read(path, f"{module}.output") for path in self._ranks(window)]
        own = torch.cat(
            [
                torch.cat([rank[:, start : start + size] for rank in outputs[::replicas]], dim=1)
                if layout["ranks_split"] == "output"
                else outputs[0][:, start : start + size]
                for start, size, replicas in runs
            ],
            dim=1,
        )
        if layout["heads"] is not None:
            own = _grouped(own, *layout["heads"])
        split_input = layout["ranks_split"] == "input"
        return Seen(torch.cat(inputs, dim=1) if split_input else inputs[0], own)

    def experts(self, name: str, window: int) -> SeenExperts:
        """Return what the experts `name` computed in a window."""
        module = self._experts[self._inside(name, self._experts)]
        return joined([_read_experts(path, module) for path in self._ranks(window)])

    def has_experts(self, name: str) -> bool:
        """Whether the experts `name` were captured."""
        return self._inside(name, self._experts) in self._experts

    def _ranks(self, window: int) -> list[Path]:
        files = self.directory.glob(f"{window}.*.safetensors")
        return sorted(files, key=lambda path: int(path.name.split(".")[1]))

    def __contains__(self, name: str) -> bool:
        return self._inside(name, self._places) in self._places

    def module_of(self, name: str) -> str:
        """Return the vLLM module that holds the linear, or the experts, `name`."""
        if self.has_experts(name):
            return self._experts[self._inside(name, self._experts)] + ROUTED
        return self._places[self._inside(name, self._places)][0]

    def _inside(self, name: str, known: Container[str]) -> str:
        """Return a module's name from its layer number on, using vLLM's names if necessary."""
        if (own := _inside(name)) in known:
            return own
        for part, new in self._metadata["renamed"].items():
            name = name.replace(part, new, 1)
        return _inside(name)

    @functools.cached_property
    def _metadata(self) -> dict[str, Any]:
        from safetensors import safe_open

        first = min(self.directory.glob("*.safetensors"))
        with safe_open(first, framework="pt") as stream:
            return {name: json.loads(text) for name, text in stream.metadata().items()}

    @functools.cached_property
    def _experts(self) -> dict[str, str]:
        """By name: the vLLM module."""
        return {_inside(module): module for module in self._metadata.get("experts", ())}

    @functools.cached_property
    def _places(self) -> dict[str, tuple[str, list[tuple[int, int, int]], dict[str, Any]]]:
        """By name: the vLLM module, its runs of columns (start, size, replicas), its layout."""
        places = {}
        for module, layout in self._metadata["layouts"].items():
            start = 0
            every = []
            for shard, held in layout["shards"].items():
                runs = []
                for size, replicas in held:
                    runs.append((start, size, replicas))
                    start += size
                places[_inside(shard)] = (module, runs, layout)
                every += runs
            # A checkpoint may already store as one linear what vLLM packs from several.
            places.setdefault(_inside(module), (module, every, layout))
        return places


def _renamed(model: Any) -> dict[str, str]:
    """Return vLLM's renamings of parts of a checkpoint's names, e.g. `.self_attn.` to `.attn.`."""
    found: dict[str, str] = {}
    for module in model.modules():
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        parts = getattr(mapper, "orig_to_new_substr", {})
        found |= {part: new for part, new in parts.items() if new is not None}
    return found


def _grouped(output: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Group queries, keys and values [tokens, (heads + 2 kv_heads) x width] by KV head."""
    import torch

    width = output.shape[1] // (heads + 2 * kv_heads)
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    parts = (p.reshape(len(p), kv_heads, -1) for p in torch.split(output, sizes, dim=1))
    return torch.cat(list(parts), dim=2).flatten(1)


def _inside(name: str) -> str:
    """Return a module's name from its layer number on: the prefixes differ.

    A BERT is `model` in vLLM and `bert` elsewhere.
    """
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] :] if numbers else parts)


def _read(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        tensor: torch.Tensor = stream.get_tensor(name)
        return tensor


def _read_experts(path: Path, module: str) -> dict[str, torch.Tensor]:
    """Return what one rank saw of experts, by part; products only of emulated ones."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        names = {part: f"{module}.{part}" for part in (*PARTS, *PRODUCTS)}
        there = set(stream.keys())
        return {part: stream.get_tensor(n) for part, n in names.items() if n in there}


def take_capture(
    llm: Any,
    directory: Path,
    windows: Sequence[int],
    serve_alone: Callable[[int], NDArray[np.floating[Any]]],
) -> Capture:
    """Serve each window by itself; return what every linear saw and the resulting values.

    `serve_alone` returns the values of the probe's window at an index. The engine must be eager:
    CUDA graphs and `torch.compile` bypass module hooks.
    """
    values = []
    llm.collective_rpc("quantgate_start_capture")
    for index in windows:
        values.append(serve_alone(index))
        llm.collective_rpc("quantgate_save_capture", args=(str(directory), index))
    llm.collective_rpc("quantgate_stop_capture")
    return Capture(directory, tuple(windows), np.concatenate(values))

"""The load audit: is what vLLM has loaded what the file holds, and is it still?

vLLM does not notice every missing tensor: a norm without one keeps its initial values. Its own
tracker skips whole modules that process their weights after loading (vllm#57108). So each parameter
is compared with the file's tensors before kernels repack it, bit by bit: codes and scales that are
equal have equal values. Afterwards a checksum says whether anything has changed it since.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.errors import printable
from quantgate.formats.stored import StoredTensors
from quantgate.measuring.load_sources import Piece, Rank, Sources, packed_linears
from quantgate.patches.loading import WATCH
from quantgate.patches.wanted import EMULATED_KV_SCALES

if TYPE_CHECKING:
    import torch

# The engine's setting that makes it compare what it loads.
SETTING = {WATCH: "quantgate.measuring.loaded.watched"}
# The attribute of a loaded model with what was found while it was loaded.
FOUND = "quantgate_load_audit"
# Most tensors that are read to see whether one has taken another's place.
MOST_ALIKE = 64
ZERO_POINT = ".input_zero_point"
# How files name the scales "k" and "v" of an attention layer's KV cache.
IN_FILES = ("{0}.{1}_scale", "{0}.attn.{1}_scale", "{0}.{1}_proj.{1}_scale",
            "{0}.{1}_proj.output_scale")  # fmt: skip


@dataclass(frozen=True)
class LoadProblem:
    """A tensor that a loaded model does not hold as the file does."""

    name: str
    value: str
    expected: str
    in_file: bool = True
    """Whether the file has the tensor: if not, the fault is the file's."""

    def __str__(self) -> str:
        return printable(f"{self.name}: {self.value}; expected {self.expected}")


@dataclass(frozen=True)
class LoadAudit:
    """What one rank's model is, held against the file."""

    problems: tuple[LoadProblem, ...]
    compared: int
    """How many of the file's tensors were found in the model, wholly or this rank's part."""
    not_compared: tuple[str, ...]
    """Kinds of parameters whose names or shapes do not tell what the file holds of them."""
    seconds: float
    failed: str = ""
    """Why the model could not be compared; "" if it could."""

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> LoadAudit:
        """Return the audit that a worker sent as JSON types."""
        problems = tuple(LoadProblem(**problem) for problem in said["problems"])
        return cls(**{**said, "problems": problems, "not_compared": tuple(said["not_compared"])})


@dataclass
class _Found:
    """What has been found of a model that is being loaded."""

    directory: Path
    problems: list[LoadProblem] = field(default_factory=list)
    claimed: set[str] = field(default_factory=set)
    not_compared: set[str] = field(default_factory=set)
    zero_points: dict[str, str] = field(default_factory=dict)
    """Where the file has each linear's static zero point, by its name in vLLM before fusing."""
    checksums: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""


@contextmanager
def watched(model: Any, directory: Path) -> Iterator[None]:
    """Compare a model with the file before its weights are repacked, and note what they become.

    It catches every exception: a model that cannot be compared can be served nevertheless.
    """
    began = time.monotonic()
    try:
        found = compared(model, StoredTensors(directory), _rank())
    except Exception as error:
        found = _Found(directory, failed=f"{type(error).__name__}: {error}")
    setattr(model, FOUND, found)
    found.seconds += time.monotonic() - began
    yield
    began = time.monotonic()
    found.checksums = _checksums(model)
    found.seconds += time.monotonic() - began


def audit_of(model: Any) -> dict[str, Any] | None:
    """Return the `LoadAudit` of a model that serves, as JSON types; None if it was not watched."""
    found: _Found | None = getattr(model, FOUND, None)
    if found is None:
        return None
    began = time.monotonic()
    problems = [
        *found.problems,
        *_since(model, found),
        *_kv_problems(model, found),
        *_zero_point_problems(model, found),
    ]
    seconds = found.seconds + time.monotonic() - began
    kinds = tuple(sorted(found.not_compared))
    return asdict(LoadAudit(tuple(problems), len(found.claimed), kinds, seconds, found.failed))


def audits_of(llm: Any) -> tuple[LoadAudit | None, ...]:
    """Return what each rank of a running engine has loaded; None if it was not watched."""
    said = llm.collective_rpc("quantgate_load_audit")
    return tuple(None if one is None else LoadAudit.from_dict(one) for one in said)


def compared(model: Any, stored: StoredTensors, rank: Rank) -> _Found:
    """Compare every parameter of a model, not repacked yet, with a rank's part of the file."""
    found = _Found(stored.directory)
    without: list[Piece] = []
    for piece in Sources(model, stored, packed_linears(model), rank).pieces():
        if piece.expected is None:
            without.append(piece)
            continue
        found.claimed.add(piece.source)
        if piece.parameter.endswith(ZERO_POINT):
            found.zero_points[piece.parameter] = piece.source
        expected = piece.expected()
        if expected is None:
            found.not_compared.add(_kind(piece.parameter))
        elif not _same(expected, piece.held):
            found.problems.append(_difference(piece, expected, stored))
    _judge_missing(found, without, stored)
    return found


def _rank() -> Rank:
    from vllm.distributed import (
        get_tensor_model_parallel_rank,
        get_tensor_model_parallel_world_size,
    )

    return Rank(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def _kind(name: str) -> str:
    """Return a parameter's name without the numbers of its layer and expert."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _judge_missing(found: _Found, without: Sequence[Piece], stored: StoredTensors) -> None:
    """Note each parameter that no tensor of the file fills.

    One of a kind that has none anywhere may only be named otherwise, if the file has a tensor that
    could be it.
    """
    kinds = {_kind(name) for name in found.claimed}
    others = [stored.shape(name) for name in stored.names if name not in found.claimed]
    for piece in without:
        shape = list(piece.held.shape)
        is_known = _kind(piece.source) in kinds
        if not is_known and any(_may_hold(other, shape) for other in others):
            found.not_compared.add(_kind(piece.parameter))
            continue
        value = "is not in the file, and vLLM serves what memory held"
        expected = f"a tensor of shape {shape}"
        found.problems.append(LoadProblem(piece.source, value, expected, in_file=False))


def _may_hold(whole: Sequence[int], part: Sequence[int]) -> bool:
    """Whether a tensor of the file has the shape of a parameter, or of several ranks' together."""
    return len(whole) == len(part) and all(
        own and size % own == 0 for size, own in zip(whole, part, strict=True)
    )


def _same(expected: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit, in the dtype of the model."""
    import torch

    ours, theirs = _bytes(_as_held(expected, held)), _bytes(held)
    # Threads would only wait for each other: an engine's own are many, and tensors are small.
    on_cpu = ours.device.type == "cpu"
    return np.array_equal(ours.numpy(), theirs.numpy()) if on_cpu else torch.equal(ours, theirs)


def _as_held(expected: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    expected = expected.to(held.device)
    if expected.element_size() == held.element_size() == 1:
        return expected.view(held.dtype)
    return expected.to(held.dtype)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _difference(piece: Piece, expected: torch.Tensor, stored: StoredTensors) -> LoadProblem:
    """Return what a piece holds instead of the file's tensor."""
    for name in _alike(piece.source, stored):
        same_size = math.prod(stored.shape(name)) == expected.numel()
        if same_size and _same(stored.read(name), piece.held):
            return LoadProblem(piece.source, f"{piece.parameter} holds {name}", "itself")
    wanted = _as_held(expected, piece.held)
    width = piece.held.element_size()
    differ = (_bytes(wanted).reshape(-1, width) != _bytes(piece.held).reshape(-1, width)).any(dim=1)
    count, all_ = int(differ.sum()), piece.held.numel()
    value = f"{count:,} of {all_:,} numbers that vLLM has loaded are others"
    return LoadProblem(piece.source, value, "what the file holds")


def _alike(source: str, stored: StoredTensors) -> list[str]:
    """Return the tensors that may have taken a tensor's place: a neighbour's, another layer's."""
    module, _, part = source.rpartition(".")
    parent = module.rpartition(".")[0]
    neighbours = [n for n in stored.names if n.startswith(f"{parent}.") and n.endswith(f".{part}")]
    others = [name for name in stored.names if _kind(name) == _kind(source)]
    return [name for name in (*neighbours, *others) if name != source][:MOST_ALIKE]


def _since(model: Any, found: _Found) -> Iterator[LoadProblem]:
    """Yield the parameters that are not finite, or not what they were once they were repacked."""
    import torch

    for name, checksum in _checksums(model).items():
        if checksum != found.checksums.get(name, checksum):
            yield LoadProblem(name, "has changed since it was loaded", "the same for every request")
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        floats = value.is_floating_point() and value.element_size() > 1
        if floats and not bool(torch.isfinite(value).all()):
            yield LoadProblem(name, "is not finite after loading", "finite numbers")


def _checksums(model: Any) -> dict[str, int]:
    """Return a checksum of each parameter, by name."""
    parameters = [(n, p) for n, p in model.named_parameters() if p.numel() and not p.is_meta]
    return {name: _checksum(parameter.data) for name, parameter in parameters}


def _checksum(value: torch.Tensor) -> int:
    """Return a CRC; on a GPU, of the sums of rows and of columns, so that little is copied."""
    import torch

    table = _bytes(value)
    if table.device.type != "cpu":
        rows = len(value) if value.ndim > 1 else 1
        table = table.reshape(rows, -1)
        table = torch.cat([table.sum(dim=dim, dtype=torch.int64) for dim in (0, 1)]).cpu()
    return zlib.crc32(table.numpy().data)


def _kv_problems(model: Any, found: _Found) -> Iterator[LoadProblem]:
    """Yield the scales of a quantized KV cache that are not the file's."""
    stored = StoredTensors(found.directory)
    for name, module in model.named_modules():
        in_use = _kv_scales_of(module)
        attention = name.removesuffix(".attn")
        for part, value in in_use.items():
            spellings = (spelling.format(attention, part) for spelling in IN_FILES)
            own = next((spelling for spelling in spellings if spelling in stored), None)
            if own is None:
                continue
            found.claimed.add(own)
            on_disk = float(stored.read(own).float().max())
            if value != on_disk:
                yield LoadProblem(own, f"{value:g} is in use", f"{on_disk:g}, the file's")


def _zero_point_problems(model: Any, found: _Found) -> Iterator[LoadProblem]:
    """Yield the static inputs' zero points that kernels have changed."""
    stored, in_use = StoredTensors(found.directory), dict(model.named_parameters())
    holders = {part: whole for whole, parts in packed_linears(model).items() for part in parts}
    for name, source in found.zero_points.items():
        linear = name.removesuffix(ZERO_POINT)
        parent, _, own = linear.rpartition(".")
        held = in_use.get(f"{parent}.{holders.get(own, own)}{ZERO_POINT}")
        if held is None or held.numel() != 1:
            continue
        value, on_disk = int(held.detach()), int(stored.read(source))
        if value != on_disk:
            yield LoadProblem(source, f"{value} is in use", f"{on_disk}, the file's")


def _kv_scales_of(module: Any) -> dict[str, float]:
    """Return the scales in use, "k" and "v", of an attention layer with a quantized KV cache."""
    emulated = getattr(module, EMULATED_KV_SCALES, None)
    if emulated is not None:
        return dict(zip("kv", emulated, strict=True))
    if not str(getattr(module, "kv_cache_dtype", "")).startswith("fp8"):
        return {}
    scales = {part: getattr(module, f"_{part}_scale", None) for part in "kv"}
    return {
        part: float(s.detach()) for part, s in scales.items() if s is not None and s.numel() == 1
    }

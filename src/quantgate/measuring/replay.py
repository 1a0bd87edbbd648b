"""Replay: feed every linear of the reference the engine's input, and compare the outputs.

Experts get the engine's inputs, the experts that it chose for each token and their weights. Of
emulated experts each product is compared; of others, the weighted sum.

Where inputs are quantized, a difference of 1e-7 can flip a code, and flips cascade, so no
free-running comparison of such a format can be tight. On the engine's own inputs every module must
agree to within rounding, in every format; one that does not is reported with its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.formats.kernels import FORMATS_RULES, LinearRules
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.precision import FLOAT32
from quantgate.measuring.reference_device import CPU, room_on
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.subject.task import GENERATE

if TYPE_CHECKING:
    import torch

    from quantgate.measuring.capture import Capture
    from quantgate.measuring.captured_experts import SeenExperts
    from quantgate.measuring.experts import ExpertsCall
    from quantgate.measuring.measurement import Announce
    from quantgate.measuring.parameters import Product
    from quantgate.subject.probe import Probe


@dataclass(frozen=True)
class ModuleError:
    """The error of one of the engine's linears, relative to the rms of the correct values."""

    name: str
    """Its name in the checkpoint."""
    module: str
    """The vLLM module that holds it."""
    output: float
    """The error of its output, computed on the engine's input."""
    input: float
    """The error of that input, computed on the outputs of the modules before it."""
    depth: int = 0
    """The number of products that each of its outputs sums."""


@dataclass(frozen=True)
class Choice:
    """The experts that one layer of the engine chose, beside the reference's on the same inputs."""

    name: str
    """The experts' name in the checkpoint."""
    tokens: int
    differ: int
    """How many tokens have other experts."""
    weights: float
    """The error of the weights, largest first, relative to their rms."""
    ids: NDArray[np.int32]
    """The engine's [tokens, k]."""
    experts: int
    """How many experts the layer has."""

    @property
    def share(self) -> float:
        """The share of tokens with other experts."""
        return self.differ / max(self.tokens, 1)


@dataclass(frozen=True)
class Replay:
    """A few windows, replayed."""

    modules: tuple[ModuleError, ...]
    """In the order of the model."""
    values: NDArray[np.floating[Any]]
    """The reference's values on the engine's inputs, for the scored tokens [m] or [m, D]."""
    served: NDArray[np.floating[Any]]
    """The engine's values for the same tokens, shaped like `values`."""
    choices: tuple[Choice, ...] = ()
    """Of each layer with experts."""
    windows: tuple[int, ...] = ()
    """The windows of the probe that were replayed."""


def replay(  # noqa: PLR0913  what is replayed, and the three ways to compute it
    directory: Path,
    probe: Probe,
    capture: Capture,
    *,
    announce: Announce,
    dtype: str = FLOAT32,
    rules: LinearRules = FORMATS_RULES,
    device: str = CPU,
) -> Replay:
    """Run the reference on a capture's windows, each linear on the engine's input.

    It computes in `dtype`, float32 or float64; `rules` belong to the kernels that served it;
    `device` is where the reference computes.
    """

    def run() -> Replay:
        model = StreamedModel(directory, dtype, task=probe.task, rules=rules, device=device)
        return _replayed(model, probe, capture, announce)

    # In a function of its own: a name for the model here would keep its memory from what follows.
    with room_on(device):
        return run()


def _replayed(model: StreamedModel, probe: Probe, capture: Capture, announce: Announce) -> Replay:
    windows = tuple(probe.windows[index] for index in capture.windows)
    found = _Observed(capture)
    hidden = model.last_hidden(windows, announce, found.linear, found.experts)
    _require_all([*model.linears, *model.experts], found.errors)
    values = (
        model.scores(windows, hidden)[0]
        if probe.task == GENERATE
        else model.outputs(windows, hidden)
    )
    return Replay(
        tuple(
            ModuleError(name, found.modules[name], *error.relative(), error.depth)
            for name, error in found.errors.items()
        ),
        values,
        capture.values,
        tuple(choice.found(name) for name, choice in found.choices.items()),
        capture.windows,
    )


class _Observed:
    """What an engine's modules gave, held against the reference as it is computed."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.errors: dict[str, _Errors] = {}
        self.modules: dict[str, str] = {}
        self.choices: dict[str, _Choices] = {}

    def linear(self, window: int, name: str, own: torch.Tensor, product: Product) -> torch.Tensor:
        if name not in self._capture:
            return product(own)
        seen = self._capture.seen(name, self._capture.windows[window])
        _require_same_tokens(name, own, seen.input)
        given = seen.input.to(own.device, own.dtype)
        output = product(given)
        self._add(name, name, own, given, output, seen.output)
        return output

    def experts(self, window: int, call: ExpertsCall) -> torch.Tensor:
        if not self._capture.has_experts(call.name):
            return call.compute(call.x, call.ids, call.weights, None)
        seen = self._capture.experts(call.name, self._capture.windows[window])
        _require_same_tokens(call.name, call.x, seen.x)
        given = seen.x.to(call.x.device, call.x.dtype)
        ids = seen.ids.to(call.ids.device, call.ids.dtype)
        weights = seen.weights.to(call.weights.device, call.weights.dtype)
        self.choices.setdefault(call.name, _Choices()).add(call, ids, weights)
        each = functools.partial(self._product, call, seen) if seen.products else None
        output = call.compute(given, ids, weights, each)
        self._add(call.name, call.name, call.x, given, output, seen.output)
        return output

    def _product(
        self,
        call: ExpertsCall,
        seen: SeenExperts,
        place: int,
        expert: int,
        own: torch.Tensor,
        product: Product,
    ) -> torch.Tensor:
        """Observe the first or second product of one expert."""
        given, served = own, seen.of_expert(expert, "gate_up" if place == 0 else "down")
        if place:
            given = seen.of_expert(expert, "activated").to(own.device, own.dtype)
        output = product(given)
        linears = call.shards(place, expert)
        if linears:
            parts = output.chunk(len(linears), dim=1), served.chunk(len(linears), dim=1)
            for linear, *part in zip(linears, *parts, strict=True):
                self._add(linear, call.name, own, given, *part)
        return output

    def _add(self, name: str, within: str, *values: torch.Tensor) -> None:
        """Add an own and a given input, an output and the engine's, to a module's errors."""
        self.modules[name] = self._capture.module_of(within)
        own, given, output, served = values
        self.errors.setdefault(name, _Errors()).add(own, given, output, served.to(own.device))


def _require_same_tokens(name: str, own: torch.Tensor, seen: torch.Tensor) -> None:
    if seen.shape != own.shape:
        raise EngineFailure(
            f"{name}: the engine's input is {list(seen.shape)}, the reference's "
            f"{list(own.shape)}: they do not serve the same tokens or layers."
        )


def _require_all(linears: Collection[str], replayed: Collection[str]) -> None:
    """Raise if a linear was not captured: otherwise it would count as correct."""
    missing = [name for name in linears if name not in replayed]
    if missing:
        raise EngineFailure(
            f"{missing[0]} and {len(missing) - 1} other modules of {len(linears)} were not found "
            "in the engine: vLLM's module names do not match the checkpoint's."
        )


def distance(found: Replay, exact: Replay) -> NDArray[np.float64]:
    """Return |Δ| of two replays' values, each [m] or [m, D]."""
    return np.abs(found.values.astype(np.float64) - exact.values)


@dataclass
class _Choices:
    """One layer's chosen experts over all windows."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    differ: int = 0
    weights: _Errors = field(default_factory=lambda: _Errors())
    experts: int = 0

    def found(self, name: str) -> Choice:
        """Return them as a result."""
        ids = np.concatenate(self.ids)
        error, _ = self.weights.relative()
        return Choice(name, len(ids), self.differ, error, ids, self.experts)

    def add(self, call: ExpertsCall, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Add the ids and weights [tokens, k] that the engine chose for a call's tokens."""
        own = call.ids.sort(dim=1).values
        self.experts = call.count
        self.ids.append(ids.int().cpu().numpy())
        self.differ += int((own != ids.sort(dim=1).values).any(dim=1).sum())
        # Sorted, because which of two experts with nearly equal weights comes first is rounding.
        largest, served = (w.sort(dim=1).values.float() for w in (call.weights, weights))
        self.weights.add(largest, largest, largest, served)


@dataclass
class _Errors:
    """One module's sums of squares over all windows."""

    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("input", "input_error", "output", "output_error"), 0)
    )
    depth: int = 0

    def add(
        self,
        own: torch.Tensor,
        given: torch.Tensor,
        output: torch.Tensor,
        engine_output: torch.Tensor,
    ) -> None:
        self.depth = own.shape[-1]
        # In the reference's own dtype: subtracting numbers that are nearly equal is exact, and a
        # sum of squares good to five digits tells whether an error is within its limit.
        parts: Mapping[str, torch.Tensor] = {
            "input": own,
            "input_error": given - own,
            "output": output,
            "output_error": engine_output.to(output.dtype) - output,
        }
        for name, tensor in parts.items():
            flat = tensor.reshape(-1)
            self.sums[name] += flat.dot(flat).item()

    def relative(self) -> tuple[float, float]:
        """Return the errors of output and input; infinite if nonzero where zero is expected."""
        return self._ratio("output"), self._ratio("input")

    def _ratio(self, kind: str) -> float:
        error, size = self.sums[f"{kind}_error"], self.sums[kind]
        if size > 0 or np.isnan(size):
            return float((error / size) ** 0.5)
        return 0.0 if error == 0 else float("inf")

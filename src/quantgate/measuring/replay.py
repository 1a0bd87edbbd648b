"""Replay: feed every linear of the reference the engine's input, and compare the outputs.

Where inputs are quantized, a difference of 1e-7 can flip a code, and flips cascade, so no
free-running comparison of such a format can be tight. On the engine's own inputs every module must
agree to within rounding, in every format; one that does not is reported with its kernel.
"""

from __future__ import annotations

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
class Replay:
    """A few windows, replayed."""

    modules: tuple[ModuleError, ...]
    """In the order of the model."""
    values: NDArray[np.floating[Any]]
    """The reference's values on the engine's inputs, for the scored tokens [m] or [m, D]."""
    served: NDArray[np.floating[Any]]
    """The engine's values for the same tokens, shaped like `values`."""


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
    errors: dict[str, _Errors] = {}

    def observe(window: int, name: str, own: torch.Tensor, product: Product) -> torch.Tensor:
        if name not in capture:
            return product(own)
        seen = capture.seen(name, capture.windows[window])
        if seen.input.shape != own.shape:
            raise EngineFailure(
                f"{name}: the engine's input is {list(seen.input.shape)}, the reference's "
                f"{list(own.shape)}: they do not serve the same tokens or layers."
            )
        given = seen.input.to(own.device, own.dtype)
        output = product(given)
        served = seen.output.to(own.device)
        errors.setdefault(name, _Errors()).add(own, given, output, served)
        return output

    hidden = model.last_hidden(windows, announce, observe)
    _require_all(model.linears, errors)
    values = (
        model.scores(windows, hidden)[0]
        if probe.task == GENERATE
        else model.outputs(windows, hidden)
    )
    return Replay(
        tuple(
            ModuleError(name, capture.module_of(name), *found.relative(), found.depth)
            for name, found in errors.items()
        ),
        values,
        capture.values,
    )


def _require_all(linears: Collection[str], replayed: Collection[str]) -> None:
    """Raise if a linear was not captured: otherwise it would count as correct."""
    missing = [name for name in linears if name not in replayed]
    if missing:
        raise EngineFailure(
            f"{missing[0]} and {len(missing) - 1} other linears of {len(linears)} were not found "
            "in the engine: vLLM's module names do not match the checkpoint's."
        )


def distance(found: Replay, exact: Replay) -> NDArray[np.float64]:
    """Return |Δ| of two replays' values, each [m] or [m, D]."""
    return np.abs(found.values.astype(np.float64) - exact.values)


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

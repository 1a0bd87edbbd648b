"""An HF model over a checkpoint's dequantized weights, with one decoder layer filled at a time."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.errors import BadInput
from quantgate.formats.kernels import FORMATS_RULES, LinearRules
from quantgate.formats.stored import LoadedTensors, StoredTensors
from quantgate.measuring.attention_rules import Fp8KVCache, in_float32, truncating_attention_name
from quantgate.measuring.empty_model import (
    decoder_of,
    embeds_by_itself,
    empty_model,
    require_layers,
    require_understood,
    transformers_version,
)
from quantgate.measuring.experts import ExpertsCall, is_experts
from quantgate.measuring.layer_by_layer import Pass
from quantgate.measuring.parameters import (
    DequantizerName,
    Parameters,
    Product,
    Watch,
    dequantizer,
    empty,
    is_linear,
)
from quantgate.measuring.read_ahead import read_ahead
from quantgate.measuring.reference_device import CPU, CUDA, exactly, together
from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, GENERATE, SEQUENCE_REWARD, Task

if TYPE_CHECKING:
    import torch

    from quantgate.formats.builds import Narrowing
    from quantgate.measuring.measurement import Announce
    from quantgate.subject.probe import Window

# Rows of full-vocabulary float32 logits held at once: 128 MiB at a vocabulary of 128k.
LOGIT_ROWS = 256
PROGRESS_SECONDS = 5.0

# What HF's code raises if it does not fit the config and tensors, or transformers' release.
UNSUITED = (
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
SHAPES = re.compile(r"\b(shapes?|sizes?|dimensions?)\b")

# As `parameters.Watch`, with the window before the name: its place among those that run.
Observer = Callable[[int, str, "torch.Tensor", Product], "torch.Tensor"]
ExpertsObserver = Callable[[int, ExpertsCall], "torch.Tensor"]


class StreamedModel:
    """An HF model whose layers are read from disk when their turn comes.

    It computes on `device`, a torch device name, and returns its tensors there.
    """

    def __init__(  # noqa: PLR0913  the parameters that `reference.measure` passes on
        self,
        directory: Path,
        dtype: str,
        dequantizer_name: DequantizerName = "own",
        task: Task = GENERATE,
        narrowing: Narrowing = "rounds",
        rules: LinearRules = FORMATS_RULES,
        device: str = CPU,
    ) -> None:
        import torch

        self.task = task
        self.device = torch.device(device)
        self.stored = StoredTensors(directory)
        self.quantization: Mapping[str, Any] | None = read_config(directory).get(
            "quantization_config"
        )
        require_understood(directory, self.quantization or {})
        self._truncates = narrowing == "truncates" and dtype == "bfloat16"
        torch_dtype: torch.dtype = getattr(torch, dtype)
        self.model = empty_model(directory, torch_dtype, task, self.stored, self.device)
        # Attention that HF computes eagerly has its own formula, which is left unchanged.
        if self._truncates and self.model.config._attn_implementation == "sdpa":
            self.model.set_attn_implementation(truncating_attention_name())
        self.parameters = Parameters(
            self.model, torch_dtype, self.stored, dequantizer(dequantizer_name), rules
        )
        self.layers = require_layers(self.model, directory)
        inside = {id(module) for module in self.layers.modules()}
        self._outside = [m for m in self.model.modules() if id(m) not in inside]
        self._running: _Step
        """The windows now going through a layer."""
        self._chosen: dict[str, dict[int, torch.Tensor]] = {}
        """By layer of experts and window: the experts of each token [tokens, k]."""
        self.parameters.note_experts = self._note_experts

    @property
    def linears(self) -> list[str]:
        """The names of the linears in its layers."""
        linears = (module for module in self.layers.modules() if is_linear(module))
        return [self.parameters.stored_name(module) for module in linears]

    @property
    def experts(self) -> list[str]:
        """The names of the experts in its layers."""
        experts = (module for module in self.layers.modules() if is_experts(module))
        return [self.parameters.stored_name(module) for module in experts]

    def last_hidden(
        self,
        windows: tuple[Window, ...],
        announce: Announce,
        observe: Observer | None = None,
        observe_experts: ExpertsObserver | None = None,
    ) -> list[torch.Tensor]:
        """Return the head's input for each window, [tokens, H].

        For a generative model, [tokens - 1, H]: a window's last token predicts nothing that is
        scored, so it is not computed. Observed windows go through a layer one by one.
        """
        told = time.monotonic()
        watch = None if observe is None else self._watch(observe)
        if observe_experts is not None:
            self.parameters.watch_experts = lambda call: observe_experts(
                self._running.windows[0], call
            )
        with exactly(self.device):
            self.fill_outside()
            steps = self._steps(windows, one_by_one=observe is not None)
            with closing(read_ahead(self._read_layer, len(self.layers))) as tensors:
                for index, layer in enumerate(self.layers):
                    if time.monotonic() - told > PROGRESS_SECONDS:
                        announce(f"layer {index + 1} of {len(self.layers)}")
                        told = time.monotonic()
                    self.parameters.fill(layer.modules(), next(tensors), watch)
                    for self._running in steps:
                        # The observer may raise too, with a reason of its own.
                        with nullcontext() if observe else self._explained(index):
                            self._run(self._running, index)
                    empty(layer)
            with self._explained(len(self.layers) - 1):
                return self._in_order(steps)

    def chosen_experts(self) -> np.ndarray[Any, Any] | None:
        """Return the experts int32 [layers, tokens, k] that `last_hidden` chose; None if dense."""
        import torch

        if not self._chosen:
            return None
        layers = [torch.cat([by[w] for w in sorted(by)]) for by in self._chosen.values()]
        return torch.stack(layers).int().numpy()

    def fill_outside(self) -> None:
        """Read everything outside the layers: embeddings, norms and the head."""
        self.parameters.fill(self._outside, LoadedTensors(self.stored, self.device), None)
        self.model.tie_weights()

    def scores(
        self, windows: tuple[Window, ...], hidden: list[torch.Tensor]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return log-probabilities [n] and most probable tokens int32 [n] of the scored tokens."""
        import torch

        self.parameters.promote_head()
        logprobs, tops = [], []
        with exactly(self.device):
            for window, rows in zip(windows, hidden, strict=True):
                targets = torch.tensor(window.ids[window.score_from :], device=self.device)
                scored = rows[window.score_from - 1 :].to(self.parameters.exact)
                for start in range(0, len(targets), LOGIT_ROWS):
                    part = slice(start, start + LOGIT_ROWS)
                    logits = self.logits(scored[part])
                    own = logits.log_softmax(dim=-1).gather(1, targets[part, None])[:, 0]
                    logprobs.append(own)
                    tops.append(logits.argmax(dim=-1))
            found, top = torch.cat(logprobs).cpu(), torch.cat(tops).cpu()
        return found.numpy(), top.numpy().astype(np.int32)

    def outputs(
        self, windows: tuple[Window, ...], hidden: list[torch.Tensor]
    ) -> np.ndarray[Any, Any]:
        """Return logits, rewards or embeddings [n, D] of the scored tokens, before activation."""
        import torch

        self.parameters.promote_head()
        exact, found = self.parameters.exact, []
        with exactly(self.device):
            for window, rows in zip(windows, hidden, strict=True):
                if self.task == EMBED and embeds_by_itself(self.model):
                    values = rows.to(exact)
                else:
                    ids = torch.tensor(window.ids, device=self.device)
                    values = self.logits(rows.to(exact), ids)
                found.append(values[-window.scored :])
            return torch.cat(found).cpu().numpy()

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [rows, labels] by HF's own code, soft-capping and scales included.

        A model with one output for a whole text looks for its last token in `ids`: one row.
        """
        # Some heads call the body's decoder themselves.
        bodies = {self.model.base_model, decoder_of(self.model)}
        for body in bodies:
            body.forward = lambda *_, **__: _BodyOutput((hidden[None],))
        if ids is None:
            ids = hidden.new_zeros(len(hidden)).long()
        try:
            logits: torch.Tensor = self.model(input_ids=ids[None]).logits
        finally:
            for body in bodies:
                del body.forward
        return logits if self.task == SEQUENCE_REWARD else logits[0]

    def _read_layer(self, index: int) -> LoadedTensors:
        """Read a layer's tensors into memory, in a thread; they move to the device later."""
        modules = self.parameters.stored_as.within(self.parameters.names[self.layers[index]])
        ahead = self.stored.in_memory(modules, pinned=self.device.type == CUDA)
        return LoadedTensors(self.stored, self.device, ahead)

    def _watch(self, observe: Observer) -> Watch:
        return lambda name, rows, product: observe(self._running.windows[0], name, rows, product)

    def _note_experts(self, name: str, ids: torch.Tensor) -> None:
        """Keep the chosen experts of the running windows, which are of one length."""
        windows = self._running.windows
        chosen = ids.reshape(len(windows), -1, ids.shape[-1]).to("cpu")
        self._chosen.setdefault(name, {}).update(zip(windows, chosen, strict=True))

    def _steps(self, windows: tuple[Window, ...], *, one_by_one: bool) -> list[_Step]:
        """Return the windows in the batches that go through the layers, grouped by length."""
        computed = [w.ids[:-1] if self.task == GENERATE else w.ids for w in windows]
        places = range(len(windows))
        groups = (
            [[place] for place in places]
            if one_by_one
            else together([len(ids) for ids in computed], self.device)
        )
        return [self._step(group, [computed[place] for place in group]) for group in groups]

    def _step(self, windows: list[int], ids: list[tuple[int, ...]]) -> _Step:
        import torch

        inputs = torch.tensor(ids, device=self.device)
        forward = functools.partial(self.model.base_model, inputs, use_cache=False)
        return _Step(windows, Pass(self.layers, forward))

    def _run(self, step: _Step, index: int) -> None:
        """Run a layer on a step's windows."""
        arguments, named = step.through.next_call(index)
        if (self.quantization or {}).get("kv_cache_scheme"):
            named["past_key_values"] = Fp8KVCache(self._kv_scales)
        if self._truncates and "position_embeddings" in named:
            named["position_embeddings"] = in_float32(named["position_embeddings"])
        step.through.output = self.layers[index](*arguments, **named)

    @contextmanager
    def _explained(self, index: int) -> Iterator[None]:
        """Turn errors that HF's code raises for an unsuitable model into `BadInput`.

        Other failures, such as running out of memory, are left alone.
        """
        try:
            yield
        except BadInput:
            raise
        except UNSUITED as error:
            if type(error) is RuntimeError and not SHAPES.search(str(error)):
                raise
            name = self.parameters.names[self.layers[index]]
            raise BadInput(
                f"{self.stored.directory}: {type(self.model).__name__} of transformers "
                f"{transformers_version()} cannot be run layer by layer: '{name}' fails "
                f"({type(error).__name__}); compare config.json with the base's, or select the "
                "checks that need no reference (-k 'not fidelity and not replay')."
            ) from error

    def _in_order(self, steps: list[_Step]) -> list[torch.Tensor]:
        """Return the head's input for each window, in the windows' order."""
        by_window: dict[int, torch.Tensor] = {}
        for step in steps:
            by_window.update(zip(step.windows, step.through.last_hidden(), strict=True))
        return [by_window[place] for place in sorted(by_window)]

    def _kv_scales(self, layer: int) -> tuple[float, float]:
        modules = self.parameters.stored_as.within(self.parameters.names[self.layers[layer]])
        attention = next((m for m in modules if f"{m}.k_scale" in self.stored), "attention")
        key, value = (float(self.stored.read(f"{attention}.{part}_scale")) for part in "kv")
        return key, value


class _BodyOutput(tuple[Any, ...]):
    """Passes for a body's output in a head: hidden states, and None for all else it reads."""

    @property
    def last_hidden_state(self) -> Any:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@dataclass(frozen=True)
class _Step:
    """Windows of one length on their way through the layers."""

    windows: list[int]
    """Their indices among those that run."""
    through: Pass

"""An HF model over a checkpoint's dequantized weights, with one decoder layer filled at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantgate.formats.kernels import FORMATS_RULES, LinearRules
from quantgate.formats.stored import LoadedTensors, StoredTensors
from quantgate.measuring.attention_rules import Fp8KVCache, in_float32, truncating_attention_name
from quantgate.measuring.empty_model import empty_model, require_understood
from quantgate.measuring.parameters import (
    DequantizerName,
    Parameters,
    Product,
    Watch,
    dequantizer,
    empty,
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

# As `parameters.Watch`, with the window before the name: its place among those that run.
Observer = Callable[[int, str, "torch.Tensor", Product], "torch.Tensor"]


class StreamedModel:
    """An HF model whose layers are read from disk when their turn comes.

    It computes on `device`, whose name is torch's; what it returns as tensors is there, too.
    """

    def __init__(  # noqa: PLR0913  as `reference.measure`, which passes them on
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
        if self._truncates:
            self.model.set_attn_implementation(truncating_attention_name())
        self.parameters = Parameters(
            self.model, torch_dtype, self.quantization, dequantizer(dequantizer_name), rules
        )
        # An encoder's layers are one module further in.
        body = self.model.base_model
        self._stack, self._stacked_as = (
            (body, "layers") if hasattr(body, "layers") else (body.encoder, "layer")
        )
        self.layers: torch.nn.ModuleList = getattr(self._stack, self._stacked_as)
        inside = {id(module) for module in self.layers.modules()}
        self._outside = [m for m in self.model.modules() if id(m) not in inside]
        self._running: _Step
        """The windows that go through a layer at the moment."""

    @property
    def linears(self) -> list[str]:
        """The names of the linears in its layers."""
        names = self.parameters.names
        return [names[m] for m in self.layers.modules() if type(m).__name__ == "Linear"]

    def last_hidden(
        self,
        windows: tuple[Window, ...],
        announce: Announce,
        observe: Observer | None = None,
    ) -> list[torch.Tensor]:
        """Return what the head is given for each window, [tokens, H].

        Of a model that generates, [tokens - 1, H]: a window's last token predicts nothing that is
        scored, so it is not computed. Windows that are observed go through a layer one by one.
        """
        told = time.monotonic()
        watch = None if observe is None else self._watch(observe)
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
                        self._running.run(index, layer)
                    empty(layer)
            return self._normed(steps)

    def fill_outside(self) -> None:
        """Read what is not in a layer: embeddings, norms and the head."""
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
        """Return logits, rewards or embeddings [n, D] of the scored tokens, not activated."""
        import torch

        self.parameters.promote_head()
        exact, found = self.parameters.exact, []
        with exactly(self.device):
            for window, rows in zip(windows, hidden, strict=True):
                if self.task == EMBED and self.model.get_output_embeddings() is not None:
                    values = rows.to(exact)  # a model that generates: its last hidden states
                else:
                    ids = torch.tensor(window.ids, device=self.device)
                    values = self.logits(rows.to(exact), ids)
                found.append(values[-window.scored :])
            return torch.cat(found).cpu().numpy()

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits [rows, labels] by HF's own code, soft-capping and scales included.

        A model with one output for a whole text looks for its last token in `ids`: one row.
        """
        from transformers.modeling_outputs import MoeModelOutputWithPast  # has all that heads read

        body = self.model.base_model
        body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden[None])
        if ids is None:
            ids = hidden.new_zeros(len(hidden)).long()
        try:
            logits: torch.Tensor = self.model(input_ids=ids[None]).logits
        finally:
            del body.forward
        return logits if self.task == SEQUENCE_REWARD else logits[0]

    def _read_layer(self, index: int) -> LoadedTensors:
        """Read a layer's tensors into memory, in a thread; they move to the device later."""
        prefix = f"{self.parameters.names[self.layers[index]]}."
        ahead = self.stored.in_memory(prefix, pinned=self.device.type == CUDA)
        return LoadedTensors(self.stored, self.device, ahead)

    def _watch(self, observe: Observer) -> Watch:
        return lambda name, rows, product: observe(self._running.windows[0], name, rows, product)

    def _steps(self, windows: tuple[Window, ...], *, one_by_one: bool) -> list[_Step]:
        """Run the model up to its layers, on windows of like length together."""
        computed = [w.ids[:-1] if self.task == GENERATE else w.ids for w in windows]
        places = range(len(windows))
        groups = (
            [[place] for place in places]
            if one_by_one
            else together([len(ids) for ids in computed], self.device)
        )
        return [self._record(group, [computed[place] for place in group]) for group in groups]

    def _normed(self, steps: list[_Step]) -> list[torch.Tensor]:
        """Return what the head is given for each window, in the windows' order."""
        body = self.model.base_model
        norm = getattr(body, "norm", None) or getattr(body, "final_norm", None)
        by_window: dict[int, torch.Tensor] = {}
        for step in steps:
            hidden = norm(step.hidden) if norm else step.hidden
            by_window.update(zip(step.windows, hidden, strict=True))
        return [by_window[place] for place in sorted(by_window)]

    def _record(self, windows: list[int], ids: list[tuple[int, ...]]) -> _Step:
        """Run the model around its layers, and note what each of them would be called with."""
        import torch

        layers, calls = self.layers, []

        class Recorder(torch.nn.Module):
            def __init__(self, layer: torch.nn.Module) -> None:
                super().__init__()
                # What HF's models look at in a layer before they call it.
                for name in ("attention_type", "layer_type", "is_sliding"):
                    if hasattr(layer, name):
                        setattr(self, name, getattr(layer, name))

            def forward(self, states: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
                calls.append((states, more, named))
                return states

        recorders = torch.nn.ModuleList(Recorder(layer) for layer in layers)
        setattr(self._stack, self._stacked_as, recorders)
        try:
            self.model.base_model(torch.tensor(ids, device=self.device), use_cache=False)
        finally:
            setattr(self._stack, self._stacked_as, layers)
        others = self._kv_cache()
        if self._truncates and "position_embeddings" in calls[0][2]:
            others["position_embeddings"] = in_float32(calls[0][2]["position_embeddings"])
        return _Step(
            windows, calls[0][0], [(more, {**named, **others}) for _, more, named in calls]
        )

    def _kv_cache(self) -> dict[str, Any]:
        """Return what makes attention see keys and values as an FP8 cache gives them back."""
        if not (self.quantization or {}).get("kv_cache_scheme"):
            return {}
        return {"past_key_values": Fp8KVCache(self._kv_scales)}

    def _kv_scales(self, layer: int) -> tuple[float, float]:
        names = self.parameters.names.values()
        attention = next(name for name in names if name.endswith(f"layers.{layer}.self_attn"))
        key, value = (float(self.stored.read(f"{attention}.{part}_scale")) for part in "kv")
        return key, value


@dataclass
class _Step:
    """Windows of one length on their way through the layers."""

    windows: list[int]
    """Their places among those that run."""
    hidden: torch.Tensor
    """[windows, tokens, H]."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """What each layer is called with besides: in order, and by name."""

    def run(self, index: int, layer: torch.nn.Module) -> None:
        more, named = self.arguments[index]
        output = layer(self.hidden, *more, **named)
        self.hidden = output[0] if isinstance(output, tuple) else output

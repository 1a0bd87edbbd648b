"""The reference source: HF modules over dequantized weights, a decoder layer in memory at a time.

Inputs are quantized as vLLM quantizes them, and scales fused as vLLM fuses them
(formats/linear.py), so that engine and reference compute the same function of the same bytes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quantgate.builds import Narrowing, truncate_to_bfloat16
from quantgate.checkpoint import BadInput, read_config
from quantgate.engine import Announce, library_versions
from quantgate.engine_failure import first_line
from quantgate.formats.groups import Group, group_of
from quantgate.formats.kernels import FORMATS_RULES, LinearRules
from quantgate.formats.linear import Dequantizer, QuantizedLinear, Quantizer, read_linear
from quantgate.formats.stored import StoredTensors
from quantgate.formats.weights import dequantize_weight
from quantgate.heads import COLBERT, head_classes
from quantgate.measurement import Measurement, Provenance, pooled
from quantgate.probe import Probe, Window
from quantgate.task import EMBED, GENERATE, SEQUENCE_REWARD, Task

if TYPE_CHECKING:
    import torch

# Rows of full-vocabulary float32 logits held at once: 128 MiB at a vocabulary of 128k.
LOGIT_ROWS = 256
PROGRESS_SECONDS = 5.0

DequantizerName = Literal["own", "library"]
# Called for every linear with the window (its place among those that run), the linear's name, the
# input [rows, in] and the product as a function of an input; returns the output [rows, out] that
# the model goes on with.
Observer = Callable[[int, str, "torch.Tensor", "Product"], "torch.Tensor"]
Product = Callable[["torch.Tensor"], "torch.Tensor"]
# What makes float32 logits [rows, V] of hidden states [rows, H], and V.
Head = tuple[Callable[["torch.Tensor"], "torch.Tensor"], int]


def measure(
    directory: Path,
    probe: Probe,
    *,
    dtype: str,
    announce: Announce,
    dequantizer: DequantizerName = "own",
    narrowing: Narrowing = "rounds",
    rules: LinearRules = FORMATS_RULES,
) -> Measurement:
    """Score `probe` with HF modules in `dtype` over the checkpoint's dequantized weights.

    The head's product and the log-softmax are in float32, or in float64 where `dtype` is that.
    `narrowing` is how rotations and attention come by bfloat16 (`builds.narrowing`), `rules` what
    the engine's kernels make of linears.
    """
    model = StreamedModel(directory, dtype, dequantizer, probe.task, narrowing, rules)
    hidden = model.last_hidden(probe.windows, announce)
    announce(f"scoring {probe.scored} tokens in {len(probe.windows)} windows")
    provenance = Provenance("reference", "cpu", "cpu", dtype, versions=library_versions())
    if probe.task != GENERATE:
        return pooled(model.outputs(probe.windows, hidden), provenance)
    logprob, top1 = model.scores(probe.windows, hidden)
    kept = None
    if dtype != "float64":
        scored = zip(probe.windows, hidden, strict=True)
        kept = np.concatenate([rows[w.score_from - 1 :].float().numpy() for w, rows in scored])
    return Measurement(logprob, top1, provenance, kept)


def read_head(directory: Path) -> Head:
    """Return a checkpoint's head."""
    import torch

    model = StreamedModel(directory, "float32")
    model.fill_outside()
    model.promote_head()

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(hidden)

    return logits, int(model.model.get_output_embeddings().weight.shape[0])


class StreamedModel:
    """An HF model whose layers are read from disk when their turn comes."""

    def __init__(
        self,
        directory: Path,
        dtype: str,
        dequantizer: DequantizerName = "own",
        task: Task = GENERATE,
        narrowing: Narrowing = "rounds",
        rules: LinearRules = FORMATS_RULES,
    ) -> None:
        import torch

        self.task = task
        self.rules = rules
        self._truncates = narrowing == "truncates" and dtype == "bfloat16"
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._exact = torch.promote_types(self.dtype, torch.float32)
        self.stored = StoredTensors(directory)
        self.quantization: Mapping[str, Any] | None = read_config(directory).get(
            "quantization_config"
        )
        if (reason := _why_not_understood(self.quantization or {})) is not None:
            raise BadInput(
                f"{directory / 'config.json'}: {reason}; the reference has no rule for it."
            )
        self._dequantize = _dequantizer(dequantizer)
        self.model = _empty_model(directory, self.dtype, task, self.stored)
        if self._truncates:
            self.model.set_attn_implementation(_truncating_attention_name())
        self._names = {module: name for name, module in self.model.named_modules()}
        # An encoder's layers are one module further in.
        body = self.model.base_model
        self._stack, self._stacked_as = (
            (body, "layers") if hasattr(body, "layers") else (body.encoder, "layer")
        )
        self.layers: torch.nn.ModuleList = getattr(self._stack, self._stacked_as)
        in_body = {id(module) for module in body.modules()}
        self._head = [
            m for m in self.model.modules() if id(m) not in in_body and m is not self.model
        ]
        inside = {id(module) for module in self.layers.modules()}
        self._window = 0
        self._outside = [m for m in self.model.modules() if id(m) not in inside]

    @property
    def linears(self) -> list[str]:
        """The names of the linears in its layers."""
        modules = self.layers.modules()
        return [self._names[m] for m in modules if type(m).__name__ == "Linear"]

    def last_hidden(
        self,
        windows: tuple[Window, ...],
        announce: Announce,
        observe: Observer | None = None,
    ) -> list[torch.Tensor]:
        """Return what the head is given for each window, [tokens, H].

        Of a model that generates, [tokens - 1, H]: a window's last token predicts nothing that is
        scored, so it is not computed.
        """
        import torch

        told = time.monotonic()
        with torch.inference_mode():
            self.fill_outside()
            steps = [self._record(window) for window in windows]
            for index, layer in enumerate(self.layers):
                if time.monotonic() - told > PROGRESS_SECONDS:
                    announce(f"layer {index + 1} of {len(self.layers)}")
                    told = time.monotonic()
                self._fill(layer.modules(), observe)
                for self._window, step in enumerate(steps):
                    step.run(index, layer)
                _empty(layer)
            body = self.model.base_model
            norm = getattr(body, "norm", None) or getattr(body, "final_norm", None)
            return [(norm(step.hidden) if norm else step.hidden)[0] for step in steps]

    def fill_outside(self) -> None:
        """Read what is not in a layer: embeddings, norms and the head."""
        self._fill(self._outside, None)
        self.model.tie_weights()

    def scores(
        self, windows: tuple[Window, ...], hidden: list[torch.Tensor]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return log-probabilities [n] and most probable tokens int32 [n] of the scored tokens."""
        import torch

        exact = self.promote_head()
        logprobs, tops = [], []
        with torch.inference_mode():
            for window, rows in zip(windows, hidden, strict=True):
                targets = torch.tensor(window.ids[window.score_from :])
                scored = rows[window.score_from - 1 :].to(exact)
                for start in range(0, len(targets), LOGIT_ROWS):
                    part = slice(start, start + LOGIT_ROWS)
                    logits = self.logits(scored[part])
                    own = logits.log_softmax(dim=-1).gather(1, targets[part, None])[:, 0]
                    logprobs.append(own)
                    tops.append(logits.argmax(dim=-1))
        return torch.cat(logprobs).numpy(), torch.cat(tops).numpy().astype(np.int32)

    def outputs(
        self, windows: tuple[Window, ...], hidden: list[torch.Tensor]
    ) -> np.ndarray[Any, Any]:
        """Return logits, rewards or embeddings [n, D] of the scored tokens, not activated."""
        import torch

        exact = self.promote_head()
        found = []
        with torch.inference_mode():
            for window, rows in zip(windows, hidden, strict=True):
                if self.task == EMBED and self.model.get_output_embeddings() is not None:
                    values = rows.to(exact)  # a model that generates: its last hidden states
                else:
                    values = self.logits(rows.to(exact), torch.tensor(window.ids))
                found.append(values[-window.scored :])
        return torch.cat(found).numpy()

    def promote_head(self) -> torch.dtype:
        """Give the head float32 parameters, or float64 ones where the model has those."""
        for module in self._head:
            for part, parameter in module.named_parameters(recurse=False):
                _set(module, part, parameter.to(self._exact))
        return self._exact

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

    def _record(self, window: Window) -> _Step:
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

        ids = window.ids[:-1] if self.task == GENERATE else window.ids
        recorders = torch.nn.ModuleList(Recorder(layer) for layer in layers)
        setattr(self._stack, self._stacked_as, recorders)
        try:
            self.model.base_model(torch.tensor([ids]), use_cache=False)
        finally:
            setattr(self._stack, self._stacked_as, layers)
        others = self._kv_cache()
        if self._truncates and "position_embeddings" in calls[0][2]:
            others["position_embeddings"] = _in_float32(calls[0][2]["position_embeddings"])
        return _Step(calls[0][0], [(more, {**named, **others}) for _, more, named in calls])

    def _kv_cache(self) -> dict[str, Any]:
        """Return what makes attention see keys and values as an FP8 cache gives them back."""
        if not (self.quantization or {}).get("kv_cache_scheme"):
            return {}
        return {"past_key_values": _Fp8KVCache(self._kv_scales)}

    def _kv_scales(self, layer: int) -> tuple[float, float]:
        attention = next(
            name for m, name in self._names.items() if name.endswith(f"layers.{layer}.self_attn")
        )
        key, value = (float(self.stored.read(f"{attention}.{part}_scale")) for part in "kv")
        return key, value

    def _fill(self, modules: Any, observe: Observer | None) -> None:
        """Give modules their parameters from disk, and quantized linears what they compute."""
        for module in modules:
            name = self._names[module]
            group = self._group_of(module, name)
            if group is not None:
                linear = read_linear(self.stored, name, group, self._dequantize, self.rules)
                self._fill_linear(module, name, linear, observe)
                continue
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    values = self._parameter(name, part)
                    self._require_shape(f"{name}.{part}", values, parameter)
                    _set(module, part, values.to(self.dtype).reshape(parameter.shape))
            if type(module).__name__ == "Linear" and module not in self._head:
                _set(module, "weight", module.weight.to(self._exact))
                if observe is not None or self.dtype != self._exact:
                    self._observe(module, name, observe, None)

    def _group_of(self, module: torch.nn.Module, name: str) -> Group | None:
        import torch

        if not isinstance(module, torch.nn.Linear):
            return None
        try:
            group = group_of(name, "Linear", self.quantization)
        except ValueError as error:
            raise BadInput(f"{self.stored.directory / 'config.json'}: {error}.") from None
        if group is not None and module in self._head:
            raise BadInput(
                f"{self.stored.directory}: its head, '{name}', is quantized, and scores are exact "
                "for a head in floating point only; leave it out with `ignore`."
            )
        return group

    def _fill_linear(
        self,
        module: torch.nn.Module,
        name: str,
        linear: QuantizedLinear,
        observe: Observer | None,
    ) -> None:
        quantize = linear.quantize_input
        # Kernels that quantize inputs multiply codes, which float32 holds exactly; the others read
        # weights that were rounded to the dtype they are served in.
        self._require_shape(f"{name}.weight", linear.weight, module.get_parameter("weight"))
        weight = linear.weight.to(self.dtype) if quantize is None else linear.weight
        _set(module, "weight", weight.to(self._exact))
        if module.bias is not None:
            _set(module, "bias", self._parameter(name, "bias").to(self.dtype))
        if quantize is not None or observe is not None or self.dtype != self._exact:
            self._observe(module, name, observe, quantize)

    def _require_shape(self, name: str, values: torch.Tensor, expected: torch.Tensor) -> None:
        """Refuse a tensor of another shape than the config's, but for dimensions of 1."""
        stored, implied = ([n for n in tensor.shape if n != 1] for tensor in (values, expected))
        if stored != implied:
            raise BadInput(
                f"{self.stored.directory}: '{name}' is {list(values.shape)} in the weights, but "
                f"config.json implies {list(expected.shape)}; correct its sizes (hidden_size, "
                "head_dim, vocab_size …), or export the checkpoint again."
            )

    def _observe(
        self,
        module: torch.nn.Module,
        name: str,
        observe: Observer | None,
        quantize: Quantizer | None,
    ) -> None:
        """Replace a linear's forward by one that quantizes its input, and lets it be watched.

        Sums are in float32, or float64, and rounded once, whatever the processor has for products
        of 16-bit numbers.
        """
        import torch

        def product(x: torch.Tensor) -> torch.Tensor:
            weight = module.get_parameter("weight")
            values = (x if quantize is None else quantize(x)).to(weight.dtype)
            bias = None if module.bias is None else module.get_parameter("bias").to(weight.dtype)
            return torch.nn.functional.linear(values, weight, bias).to(x.dtype)

        def forward(x: torch.Tensor) -> torch.Tensor:
            rows = x.reshape(-1, x.shape[-1])
            if observe is None:
                output = product(rows)
            else:
                output = observe(self._window, name, rows, product)
            return output.reshape(*x.shape[:-1], -1)

        module.forward = forward

    def _parameter(self, name: str, part: str) -> torch.Tensor:
        full = f"{name}.{part}"
        if full in self.stored:
            return self.stored.read(full)
        if name.endswith(".experts") and part in ("gate_up_proj", "down_proj"):
            return _stacked_experts(self.stored, name, part)
        head = self.model.get_output_embeddings()
        if self._names.get(head) == name and part == "weight":
            embedding = self.model.get_input_embeddings()
            return self.stored.read(f"{self._names[embedding]}.weight")  # a tied head
        return self.stored.read(full)


@dataclass
class _Step:
    """One window on its way through the layers."""

    hidden: torch.Tensor
    """[1, tokens, H]."""
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """What each layer is called with besides: in order, and by name."""

    def run(self, index: int, layer: torch.nn.Module) -> None:
        more, named = self.arguments[index]
        output = layer(self.hidden, *more, **named)
        self.hidden = output[0] if isinstance(output, tuple) else output


class _Fp8KVCache:
    """Gives keys and values back as an FP8 (E4M3) cache would: divided, rounded, multiplied."""

    def __init__(self, scales: Callable[[int], tuple[float, float]]) -> None:
        self.scales = scales

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from quantgate.formats.activations import fp8_cached

        key_scale, value_scale = self.scales(layer_idx)
        return fp8_cached(key, key_scale), fp8_cached(value, value_scale)

    def get_seq_length(self, *_: Any) -> int:
        return 0


def _why_not_understood(quantization: Mapping[str, Any]) -> str | None:
    """Return what in a quantization_config would make a reference without it a wrong one."""
    method = quantization.get("quant_method", "compressed-tensors")
    if method != "compressed-tensors":
        return f"quant_method is '{method}', not 'compressed-tensors'"
    if quantization.get("transform_config"):
        return "transform_config rotates weights and inputs"
    if (quantization.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "sparsity_config stores weights sparsely"
    cache = quantization.get("kv_cache_scheme") or {}
    if cache and (cache.get("type"), cache.get("strategy")) != ("float", "tensor"):
        return "kv_cache_scheme is not FP8 with a scale for each tensor"
    for name, group in (quantization.get("config_groups") or {}).items():
        if not group.get("weights"):
            return f"config group '{name}' has no weights"
        if group.get("output_activations"):
            return f"config group '{name}' quantizes outputs"
    return None


def _dequantizer(name: DequantizerName) -> Dequantizer:
    if name == "own":
        return lambda tensors, group: dequantize_weight(tensors, group["weights"])
    from quantgate.library_weights import library_dequantize

    return library_dequantize


def _empty_model(directory: Path, dtype: torch.dtype, task: Task, stored: StoredTensors) -> Any:
    """Return the HF model of a checkpoint's config, without weights: everything is on `meta`."""
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = _model_class(config, task, stored)(
                config, dtype=dtype, trust_remote_code=False, attn_implementation="sdpa"
            )
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{directory}: transformers cannot build it ({first_line(error)})."
        ) from None
    _compute_buffers(model)
    return model.eval()


def _model_class(config: Any, task: Task, stored: StoredTensors) -> Callable[..., Any]:
    """Return what builds the HF model of a config that does a task."""
    import transformers

    architecture = next(iter(config.architectures or ()), "")
    if (own := head_classes().get(architecture)) is not None:
        if architecture == COLBERT:
            config.colbert_dim = len(stored.read("linear.weight"))
        return lambda config, trust_remote_code, **options: own._from_config(config, **options)
    kind = {
        "token_classify": transformers.AutoModelForTokenClassification,
        "token_reward": transformers.AutoModelForTokenClassification,
        "sequence_reward": transformers.AutoModelForSequenceClassification,
    }.get(task, transformers.AutoModelForCausalLM)
    build: Callable[..., Any] = kind.from_config
    return build


def _compute_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint stores, e.g. rotary frequencies, as HF does."""
    import torch

    for module in model.modules():
        missing = [name for name, b in module.named_buffers(recurse=False) if b.is_meta]
        for name in missing:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)


def _set(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    import torch

    setattr(module, name, torch.nn.Parameter(values, requires_grad=False))


def _truncating_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """HF's sdpa attention, with bfloat16 cut off as vLLM's AVX2 build does it (`builds`).

    Queries and keys come rotated in float32; all are [1, heads, tokens, width].
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query, key = (truncate_to_bfloat16(x.float()).float() for x in (query, key))
    found, _ = sdpa_attention_forward(module, query, key, value.float(), mask, **options)
    assert isinstance(found, torch.Tensor)
    return truncate_to_bfloat16(found), None


@functools.cache
def _truncating_attention_name() -> str:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    name = "quantgate_truncating"
    AttentionInterface.register(name, _truncating_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _in_float32(positions: Any) -> Any:
    """Return cosines and sines in float32, so that what is rotated by them is not rounded."""
    return None if positions is None else tuple(part.float() for part in positions)


def _empty(layer: torch.nn.Module) -> None:
    """Free a layer's parameters, and forget how its linears were told to compute."""
    for module in layer.modules():
        module.__dict__.pop("forward", None)
        for name, parameter in module.named_parameters(recurse=False):
            _set(module, name, parameter.to("meta"))


def _stacked_experts(stored: StoredTensors, name: str, part: str) -> torch.Tensor:
    """Return the experts' weights [experts, out, in], which checkpoints store one by one."""
    import torch

    def experts() -> Iterator[torch.Tensor]:
        index = 0
        sources = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        while f"{name}.{index}.{sources[0]}.weight" in stored:
            own = [stored.read(f"{name}.{index}.{source}.weight") for source in sources]
            yield torch.cat(own)
            index += 1

    found = list(experts())
    if not found:
        raise BadInput(f"{stored.directory}: there are no weights for '{name}.{part}'.")
    return torch.stack(found)

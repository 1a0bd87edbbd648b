"""Give an HF model's modules their parameters from a checkpoint, and its linears their rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from quantgate.errors import BadInput
from quantgate.formats.groups import Group, group_of
from quantgate.formats.linear import Dequantizer, QuantizedLinear, Quantizer, read_linear
from quantgate.formats.weights import dequantize_weight
from quantgate.measuring.checkpoint_names import WEIGHT, CheckpointNames
from quantgate.measuring.experts import (
    Compute,
    ExpertsCall,
    WatchExperts,
    compute_experts,
    is_experts,
    is_router,
    stacks_of,
    watch_router,
)
from quantgate.subject.files import read_config

if TYPE_CHECKING:
    import torch

    from quantgate.formats.kernels import LinearRules
    from quantgate.formats.stored import LoadedTensors, StoredTensors

DequantizerName = Literal["own", "library"]
Product = Callable[["torch.Tensor"], "torch.Tensor"]
# Called for every linear of a layer with its name, its input [rows, in] and the product as a
# function of an input; returns the output [rows, out] that the model continues with.
Watch = Callable[[str, "torch.Tensor", Product], "torch.Tensor"]


def dequantizer(name: DequantizerName) -> Dequantizer:
    """Return our dequantizer, or the compressed-tensors library's."""
    if name == "own":
        return lambda tensors, group: dequantize_weight(tensors, group["weights"])
    from quantgate.formats.library_weights import library_dequantize

    return library_dequantize


class Parameters:
    """Fills the modules of one model, on the device of the given tensors, and empties them."""

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        stored: StoredTensors,
        dequantize: Dequantizer,
        rules: LinearRules,
    ) -> None:
        import torch

        self.model = model
        self.stored_as = CheckpointNames(model, stored.names)
        self.dtype = dtype
        self.exact = torch.promote_types(dtype, torch.float32)
        """The dtype of products: float32, or float64 if activations are float64."""
        self.names: dict[torch.nn.Module, str] = {m: name for name, m in model.named_modules()}
        """HF's."""
        in_body = {id(module) for module in model.base_model.modules()}
        self.head: list[torch.nn.Module] = [
            m for m in model.modules() if id(m) not in in_body and m is not model
        ]
        self._quantization = read_config(stored.directory).get("quantization_config")
        self._tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self._dequantize = dequantize
        self._rules = rules
        self._inputs: Quantizer | None = None
        """The quantizer of the inputs of the stacked weights that were read last."""
        self.note_experts: Callable[[str, torch.Tensor], None] = lambda _, __: None
        """Called with the name of a layer's experts and the chosen ones [tokens, k]."""
        self.watch_experts: WatchExperts | None = None

    def fill(
        self, modules: Iterable[torch.nn.Module], stored: LoadedTensors, watch: Watch | None
    ) -> None:
        """Give modules their parameters, and quantized linears and experts their rules.

        Raises `BadInput` if a tensor is missing or does not fit the config.
        """
        for module in modules:
            name = self.stored_name(module)
            group = self._group_of(module, name, stored)
            if group is None:
                self._fill_whole(module, stored, watch)
            else:
                linear = read_linear(stored, name, group, self._dequantize, self._rules)
                self._fill_linear(module, linear, stored, watch)

    def stored_name(self, module: torch.nn.Module) -> str:
        """Return a module's name in the checkpoint."""
        name = self.names[module]
        return self.stored_as.stack(name) if is_experts(module) else self.stored_as.module(name)

    def promote_head(self) -> None:
        """Convert the head's parameters to the dtype of exact products."""
        for module in self.head:
            for part, parameter in module.named_parameters(recurse=False):
                _set(module, part, parameter.to(self.exact))

    def _fill_whole(
        self, module: torch.nn.Module, stored: LoadedTensors, watch: Watch | None
    ) -> None:
        """Fill a module whose parameters are stored unquantized, and its stored buffers."""
        name = self.names[module]
        self._inputs = None
        for part, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                values = self._parameter(name, part, stored)
                _require_shape(stored, f"{name}.{part}", values, parameter)
                # As in `_fill_linear`.
                values = values if self._inputs is not None else values.to(self.dtype)
                _set(module, part, values.reshape(parameter.shape))
        for part, buffer in module.named_buffers(recurse=False):
            if f"{name}.{part}" in self.stored_as:
                module._buffers[part] = self._parameter(name, part, stored).to(buffer.dtype)
        if is_linear(module) and module not in self.head:
            _set(module, WEIGHT, module.get_parameter(WEIGHT).to(self.exact))
            if watch is not None or self.dtype != self.exact:
                _compute_by_rule(module, self.stored_name(module), watch, None)
        elif is_experts(module):
            self._fill_experts(module)
        elif self._inputs is not None:
            raise BadInput(
                f"{stored.directory}: the inputs of '{name}' are quantized, and it is stacked of "
                "several linears; the reference has no rule for that."
            )
        elif watch is not None and is_router(module):
            watch_router(module, self.stored_name(module), watch)

    def _fill_experts(self, module: torch.nn.Module) -> None:
        """Give experts, whose parameters are filled, the rules of their products."""
        for part, stack in module.named_parameters(recurse=False):
            _set(module, part, stack.to(self.exact) if stack.ndim == 3 else stack)
        own, name = self.names[module], self.stored_name(module)
        stacks = stacks_of(module)
        parts, count = list(stacks), len(next(iter(stacks.values())))

        def shards(place: int, expert: int) -> list[str]:
            return self.stored_as.shards(f"{own}.{parts[place]}", expert)

        def call(x: Any, ids: Any, weights: Any, compute: Compute) -> torch.Tensor:
            self.note_experts(name, ids)
            if self.watch_experts is None:
                return compute(x, ids, weights, None)
            return self.watch_experts(ExpertsCall(name, x, ids, weights, count, compute, shards))

        compute_experts(module, self._inputs, call)

    def _group_of(self, module: torch.nn.Module, name: str, stored: LoadedTensors) -> Group | None:
        group = self._group(name, stored) if is_linear(module) else None
        if group is not None and module in self.head:
            raise BadInput(
                f"{stored.directory}: its head, '{name}', is quantized, and scores are exact "
                "for a head in floating point only; leave it out with `ignore`."
            )
        return group

    def _group(self, name: str, stored: LoadedTensors) -> Group | None:
        """Return the config group of one of the checkpoint's linears."""
        try:
            return group_of(name, "Linear", self._quantization)
        except ValueError as error:
            raise BadInput(f"{stored.directory / 'config.json'}: {error}.") from None

    def _fill_linear(
        self,
        module: torch.nn.Module,
        linear: QuantizedLinear,
        stored: LoadedTensors,
        watch: Watch | None,
    ) -> None:
        name, quantize = self.stored_name(module), linear.quantize_input
        # Kernels that quantize inputs multiply codes, which float32 represents exactly; the others
        # read weights rounded to the serving dtype.
        weight = linear.weight.T if _is_transposed(module) else linear.weight
        _require_shape(stored, f"{name}.{WEIGHT}", weight, module.get_parameter(WEIGHT))
        weight = weight.to(self.dtype) if quantize is None else weight
        _set(module, WEIGHT, weight.to(self.exact))
        if module.bias is not None:
            _set(module, "bias", self._parameter(self.names[module], "bias", stored).to(self.dtype))
        if quantize is not None or watch is not None or self.dtype != self.exact:
            _compute_by_rule(module, name, watch, quantize)

    def _parameter(self, name: str, part: str, stored: LoadedTensors) -> torch.Tensor:
        full = f"{name}.{part}" if name else part

        def read(weight: str) -> torch.Tensor:
            return self._weight(weight, stored)

        if (source := self._tied.get(full)) is None:
            return self.stored_as.read(full, read)
        if full not in self.stored_as:
            return self.stored_as.read(source, read)
        own = self.stored_as.read(full, read)
        if source in self.stored_as and not _alike(own, self.stored_as.read(source, read)):
            raise BadInput(
                f"{stored.directory}: config.json ties '{full}' to '{source}' "
                "(tie_word_embeddings), but the weights hold two that differ: vLLM serves the one, "
                "transformers the other; export the checkpoint again, or correct config.json."
            )
        return own

    def _weight(self, name: str, stored: LoadedTensors) -> torch.Tensor:
        """Return one of the checkpoint's weights, dequantized, that is part of a parameter."""
        module = name.removesuffix(f".{WEIGHT}")
        if "weight_scale" not in stored.stored.parts_of(module):
            return stored.read(name)
        if (group := self._group(module, stored)) is None:
            return stored.read(name)
        linear = read_linear(stored, module, group, self._dequantize, self._rules)
        inputs = group.get("input_activations") or {}
        # NVFP4's is "local": its groups' scales are dynamic, and the global one is static.
        if linear.quantize_input is not None and inputs.get("dynamic") is not True:
            raise BadInput(
                f"{stored.directory}: the inputs of '{module}' have static scales, which vLLM "
                "takes from all experts together; the reference has no rule for that."
            )
        self._inputs = linear.quantize_input
        return linear.weight


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear, including GPT-2's `Conv1D`."""
    import torch

    return isinstance(module, torch.nn.Linear) or _is_transposed(module)


def _is_transposed(module: torch.nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear with a weight [in, out]."""
    return type(module).__name__ == "Conv1D"


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return one.shape == other.shape and torch.equal(one, other.to(one.dtype))


def empty(layer: torch.nn.Module) -> None:
    """Free a layer's parameters, and remove the rules of its linears."""
    for module in layer.modules():
        module.__dict__.pop("forward", None)
        for name, parameter in module.named_parameters(recurse=False):
            _set(module, name, parameter.to("meta"))


def _require_shape(
    stored: LoadedTensors, name: str, values: torch.Tensor, expected: torch.Tensor
) -> None:
    """Reject a tensor whose shape differs from the config's, ignoring dimensions of 1."""
    found, implied = ([n for n in tensor.shape if n != 1] for tensor in (values, expected))
    if found != implied:
        raise BadInput(
            f"{stored.directory}: '{name}' is {list(values.shape)} in the weights, but "
            f"config.json implies {list(expected.shape)}; correct its sizes (hidden_size, "
            "head_dim, vocab_size …), or export the checkpoint again."
        )


def _compute_by_rule(
    module: torch.nn.Module, name: str, watch: Watch | None, quantize: Quantizer | None
) -> None:
    """Replace a linear's forward by one that quantizes its input and calls the observer.

    Sums are in float32, or float64, and rounded once, whatever 16-bit products the processor
    offers.
    """
    import torch

    def product(x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = module.get_parameter("weight")
        if _is_transposed(module):
            weight = weight.T
        values = (x if quantize is None else quantize(x)).to(weight.dtype)
        bias = None if module.bias is None else module.get_parameter("bias").to(weight.dtype)
        return torch.nn.functional.linear(values, weight, bias).to(x.dtype)

    def forward(x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = product(rows) if watch is None else watch(name, rows, product)
        return output.reshape(*x.shape[:-1], -1)

    module.forward = forward


def _set(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    import torch

    setattr(module, name, torch.nn.Parameter(values, requires_grad=False))

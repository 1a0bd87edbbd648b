"""Rules about which modules are quantized: exactly those that the config says."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from quantgate.audit.decode import is_float
from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import LAYER, ROUTER, Inventory
from quantgate.audit.quantization import Group, fused_names, pattern_problem

HEAD = re.compile(r"(?:^|\.)(?:lm_head|score|classifier|v_head|qa_outputs)(?:\.|$)")
VISION = re.compile(
    r"(?:^|\.)(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector)(?:\.|$)"
)
EXPERT = re.compile(r"(\.experts)\.\d+\.")
# Share of layers lacking a module up to which that is a fault, not a different kind of layer.
FEW = 0.1


def _nothing(inventory: Inventory) -> Iterator[Place]:
    codes = (e for e in inventory.tensors.values() if e.shape and not is_float(e.dtype))
    if inventory.quantization is not None and inventory.tensors and next(codes, None) is None:
        method = inventory.quantization.method or "no method"
        value = f"{method}, and no module has quantized tensors"
        yield Place("quantization_config", value, "quantized modules", "config.json")


def _no_config(inventory: Inventory) -> Iterator[Place]:
    if inventory.quantization is None and "hf_quant_config.json" not in inventory.documents:
        for name in inventory.quantized[:1]:
            value = f"is quantized, as {len(inventory.quantized)} modules are"
            yield Place(name, value, "a quantization_config", "config.json")


def _unquantized(inventory: Inventory) -> Iterator[Place]:
    """Linears that the config quantizes but that are unquantized on disk."""
    if inventory.resolver is None or inventory.config.get("model_type") == "gpt2":
        return
    quantized = set(inventory.quantized)
    for name in inventory.linears:
        if name not in quantized and (group := inventory.resolver.by_compressed_tensors(name)):
            weight = inventory.modules[name]["weight"]
            expected = f"quantized tensors: {group.name} targets it"
            yield Place(name, f"is {weight.dtype} {list(weight.shape)}", expected)


def _beyond(inventory: Inventory) -> Iterator[Place]:
    if inventory.resolver is None:
        return
    for name in inventory.quantized:
        if inventory.resolver.by_compressed_tensors(name) is None:
            parts = ", ".join(sorted(inventory.modules[name]))
            value = f"is quantized on disk ({parts})"
            yield Place(name, value, "a whole weight: the config ignores it or no target names it")


def _bad_patterns(inventory: Inventory) -> Iterator[Place]:
    if inventory.resolver is None:
        return
    for key, pattern in _patterns(inventory):
        if problem := pattern_problem(pattern):
            yield Place(f"{key}: {pattern}", problem, "a name or re: and an expression")
    for name in inventory.linears:
        inventory.resolver.by_compressed_tensors(name)
    if inventory.resolver.is_slow:
        yield Place("ignore, targets", "take too long to match", "simple expressions")


def _unused_targets(inventory: Inventory) -> Iterator[Place]:
    if (resolver := inventory.resolver) is None or not inventory.linears:
        return
    for group in resolver.groups:
        for target in group.targets:
            used = target == "Linear" or any(resolver.matches(n, target) for n in inventory.modules)
            if not used and ("." in target or target.startswith("re:")):
                yield Place(f"{group.name}.targets: {target}", "matches no module", "a module")


def _unused_ignores(inventory: Inventory) -> Iterator[Place]:
    if (resolver := inventory.resolver) is None or not inventory.linears:
        return
    for pattern in resolver.ignore:
        if pattern == "lm_head" or not ("." in pattern or pattern.startswith("re:")):
            continue  # a tied head is not stored
        if not any(resolver.matches(name, pattern) for name in inventory.modules):
            yield Place(f"ignore: {pattern}", "matches no module", "a module", "config.json")


def _patterns(inventory: Inventory) -> Iterator[tuple[str, str]]:
    quantization = inventory.quantization
    if quantization is None:
        return
    yield from (("ignore", pattern) for pattern in quantization.ignore)
    for group in quantization.groups:
        yield from ((f"{group.name}.targets", target) for target in group.targets)


def _libraries(inventory: Inventory) -> Iterator[Place]:
    """Modules that compressed-tensors and vLLM put in different groups."""
    resolver = inventory.resolver
    if resolver is None:
        return
    for fused, shards in fused_names(inventory.linears).items():
        vllm = resolver.by_vllm(fused, shards)
        each = {shard: resolver.by_compressed_tensors(shard) for shard in shards}
        if vllm == "refused" or len(set(map(_name, each.values()))) > 1:
            continue  # `fused-mixed` reports it
        (mine,) = set(map(_name, each.values()))
        if mine != _name(vllm):
            value = f"{_name(vllm)} by vLLM, {mine} by compressed-tensors"
            yield Place(fused, value, "one group by either", "config.json")


def _fused(inventory: Inventory) -> Iterator[Place]:
    """Shards of one vLLM layer that are not quantized alike."""
    resolver = inventory.resolver
    if resolver is None:
        return
    for fused, shards in fused_names(inventory.linears).items():
        each = {shard: _name(resolver.by_compressed_tensors(shard)) for shard in shards}
        if len(set(each.values())) > 1:
            value = ", ".join(f"{name.rpartition('.')[2]} {group}" for name, group in each.items())
            yield Place(fused, value, "one group for all that vLLM fuses", "config.json")


def _name(group: Group | str | None) -> str:
    if isinstance(group, Group):
        return group.name
    return group or "unquantized"


def _sensitive(inventory: Inventory) -> Iterator[Place]:
    """Heads, routers and vision towers that are quantized without a target naming them."""
    for name in inventory.quantized:
        kind = next((k for k, p in SENSITIVE.items() if p.search(name)), None)
        if kind is None or (inventory.resolver is not None and inventory.resolver.names(name)):
            continue
        yield Place(name, f"is a {kind} and quantized", "a whole weight, or a target that names it")


SENSITIVE = {"head": HEAD, "router": ROUTER, "part of a vision or audio tower": VISION}


def _uneven(inventory: Inventory) -> Iterator[Place]:
    """Modules that a layer lacks although nearly all its neighbours have them."""
    for prefix, layers in _layers(inventory).items():
        kinds = Counter(frozenset(own) for own in layers.values())
        usual, count = kinds.most_common(1)[0]
        for number, own in layers.items():
            few = kinds[frozenset(own)] <= max(1, FEW * len(layers))
            if own < usual and few and count > len(layers) / 2:
                for module in sorted(usual - own):
                    value = f"is missing; {count} of {len(layers)} layers have it"
                    yield Place(f"{prefix}{number}.{module}", value, "the module's tensors")


def _layer_count(inventory: Inventory) -> Iterator[Place]:
    said = inventory.size("num_hidden_layers")
    layers = _layers(inventory)
    if said is None or len(layers) != 1:
        return  # with an encoder present, layers cannot be attributed to either
    ((prefix, numbers),) = layers.items()
    missing = [number for number in range(min(said, 100_000)) if number not in numbers]
    if missing:
        value = f"{len(numbers)} layers, without {prefix}{missing[0]}"
        yield Place("num_hidden_layers", value, str(said), "config.json")
    extra = inventory.size("num_nextn_predict_layers") or inventory.size("mtp_num_layers") or 0
    for number in sorted(numbers):
        if number >= said + extra:
            yield Place(f"{prefix}{number}", "is a layer beyond the last", f"{said} layers")


def _layers(inventory: Inventory) -> dict[str, dict[int, set[str]]]:
    """Return the modules of each layer, by the prefix before the layer number."""
    layers: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in inventory.modules:
        if match := LAYER.search(module + "."):
            own = module[match.end() :]
            layers[module[: match.start(1)]][int(match.group(1))].add(own)
    return layers


def _counts(inventory: Inventory) -> Iterator[Place]:
    """How many linears are stored in each way, to compare with the recipe."""
    if inventory.quantization is None:
        return
    counts = Counter(_stored_as(inventory, name) for name in inventory.linears)
    value = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    if value:
        yield Place("linears", value, "as the recipe has it")


def _stored_as(inventory: Inventory, name: str) -> str:
    parts = inventory.modules[name]
    weight = parts.get("weight_packed", parts.get("weight", parts.get("qweight")))
    if name not in inventory.quantized:
        return f"whole ({weight.dtype})" if weight else "whole"
    group = inventory.groups.get(name)
    bits = f"{group.weights.kind}{group.weights.bits}" if group and group.weights else "quantized"
    return f"{bits} ({weight.dtype})" if weight else bits


def _experts(inventory: Inventory) -> Iterator[Place]:
    """Experts of one layer that are not stored alike; vLLM loads them as one."""
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for name in inventory.linears:
        if EXPERT.search(name):
            kinds[EXPERT.sub(r"\1.", name)][_stored_as(inventory, name)] += 1
    for experts, counts in kinds.items():
        if len(counts) > 1:
            value = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
            yield Place(experts, value, "all experts of a layer alike")


RULES = (
    Rule(
        "nothing-quantized",
        "error",
        "The config promises a quantized model, and what is served is not.",
        "sglang#32736, Model-Optimizer#2203: patterns that match nothing, and no error",
        _nothing,
    ),
    Rule(
        "no-quantization-config",
        "error",
        "Without a quantization_config the codes are loaded as if they were weights.",
        "a config.json copied from the base over the quantized one",
        _no_config,
    ),
    Rule(
        "not-quantized",
        "error",
        "vLLM makes a quantized layer for it and finds none of its tensors.",
        "sglang#32736, Model-Optimizer#1596, GPTQModel#2934",
        _unquantized,
    ),
    Rule(
        "quantized-beyond",
        "error",
        "vLLM makes a whole layer for it and loads codes as weights, or nothing.",
        "vllm#48508: 476 layers; vllm#28072, compressed-tensors#862",
        _beyond,
    ),
    Rule(
        "pattern-invalid",
        "error",
        "A pattern that cannot be used decides about no module.",
        "vllm#48508",
        _bad_patterns,
    ),
    Rule(
        "target-unused",
        "warning",
        "A target that matches nothing was meant for something.",
        "Model-Optimizer#2203, llm-compressor#2833",
        _unused_targets,
    ),
    Rule(
        "ignore-unused",
        "note",
        "An ignored name that matches nothing was meant for something, or for another model.",
        "llm-compressor#2597",
        _unused_ignores,
    ),
    Rule(
        "libraries-differ",
        "error",
        "The library that wrote the checkpoint and the engine disagree about a layer.",
        "vllm#48508, vllm#28072, vllm#51910, sglang#24929",
        _libraries,
    ),
    Rule(
        "fused-mixed",
        "error",
        "vLLM loads q/k/v and gate/up as one layer each and refuses shards of two kinds.",
        "vllm#20046, vllm#28878",
        _fused,
    ),
    Rule(
        "experts-mixed",
        "error",
        "vLLM loads all experts of a layer as one and takes the first one's scheme.",
        "llm-compressor#2084, llm-compressor#2833",
        _experts,
    ),
    Rule(
        "sensitive-quantized",
        "error",
        "Heads, routers and vision towers lose far more than other linears, and a class target "
        "takes them by accident.",
        "llm-compressor#2211: rerankers that answer 0.50 or 1.00; llm-compressor#2597",
        _sensitive,
    ),
    Rule(
        "layer-uneven",
        "error",
        "A module that one layer lacks is served with whatever memory held before.",
        "vllm#57108, sglang#37679",
        _uneven,
    ),
    Rule(
        "layer-count",
        "error",
        "Layers that are missing are served uninitialized, those beyond are dropped.",
        "sglang#37679",
        _layer_count,
    ),
    Rule(
        "precision-counts",
        "note",
        "Counts of linears by precision, to be held against the recipe.",
        "Model-Optimizer#868",
        _counts,
    ),
)

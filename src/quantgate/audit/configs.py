"""Rules that check config.json and generation_config.json against the tensors and the base's."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from typing import Any

from quantgate.audit.decode import same_bytes
from quantgate.audit.effective import NO_DIFFERENCE, NOTHING, differences
from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import Inventory
from quantgate.audit.layout import format_of, groups_of_columns, layout_of, layouts

CONFIG, GENERATION = "config.json", "generation_config.json"
DEGREES = (1, 2, 4, 8)
# Linears that tensor parallelism splits along their inputs.
ROW_PARALLEL = re.compile(r"\.(?:o_proj|down_proj|out_proj|dense|w2)$")


def _differs(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None or not inventory.base.config or not inventory.config:
        return
    for key, own, base in differences(inventory.config, inventory.base.config):
        yield Place(key, _shown(own), f"{_shown(base)}, the base's", CONFIG)
    own_flag, flag = _tied(inventory), _tied(inventory.base)
    unties = own_flag is False and "lm_head.weight" in inventory.tensors
    if flag is not None and own_flag is not flag and not unties:
        said = "nothing" if own_flag is None else own_flag
        yield Place("tie_word_embeddings", str(said), f"{flag}, the base's", CONFIG)


def _tied(inventory: Inventory) -> bool | None:
    """Return the tie flag of a config, None if it says nothing."""
    for config in (inventory.config, inventory.text_config):
        if isinstance(said := config.get("tie_word_embeddings"), bool):
            return said
    return None


def _dtype(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = (_dtype_of(i.config) for i in (inventory, inventory.base))
    if own and base and own != base:
        yield Place("dtype", own, f"{base}, the base's", CONFIG)


def _dtype_of(config: Mapping[str, Any]) -> str:
    said = config.get("dtype", config.get("torch_dtype"))
    return said if isinstance(said, str) else ""


def _unlike(own: Any, base: Any) -> bool:
    if type(own) is not type(base) and {type(own), type(base)} != {int, float}:
        return True
    return bool(own != base)


def _shown(value: Any) -> str:
    return "nothing" if value is NOTHING else repr(value)


def _said(config: Mapping[str, Any], key: str) -> str:
    return repr(config[key]) if key in config else "nothing"


def _generation(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = inventory.document(GENERATION), inventory.base.document(GENERATION)
    if GENERATION not in inventory.base.documents:
        # Then the base stops where its config says.
        base = {key: inventory.base.text_config.get(key) for key in own if key.endswith("token_id")}
        own = {key: own[key] for key in base}
    elif not own:
        yield Place(GENERATION, "is missing", "the base's", GENERATION)
        return
    for key in sorted(own.keys() | base.keys()):
        if key not in NO_DIFFERENCE and _unlike(own.get(key), base.get(key)):
            yield Place(key, _said(own, key), f"{_said(base, key)}, the base's", GENERATION)


def _vocabulary(inventory: Inventory) -> Iterator[Place]:
    """Vocabularies must have as many rows as the config says, and no fewer than the base's."""
    said = inventory.size("vocab_size")
    embedding = next(
        (
            n
            for n in inventory.tensors
            if n.endswith(("embed_tokens.weight", "word_embeddings.weight"))
        ),
        None,
    )
    if said is not None and embedding is not None:
        rows = (inventory.tensors[embedding].shape or (0,))[0]
        if rows != said:
            yield Place("vocab_size", str(said), f"{rows}, the rows of {embedding}", CONFIG)
    base = inventory.base.size("vocab_size") if inventory.base else None
    if said is not None and base is not None and said < base:
        yield Place("vocab_size", str(said), f"{base}, the base's", CONFIG)


def _padded(inventory: Inventory) -> Iterator[Place]:
    said = inventory.size("vocab_size")
    base = inventory.base.size("vocab_size") if inventory.base else None
    if said is not None and base is not None and said > base:
        yield Place("vocab_size", str(said), f"{base}, the base's", CONFIG)


def _sizes(inventory: Inventory) -> Iterator[Place]:
    """Sizes in the config that the shapes of tensors contradict."""
    hidden, heads = inventory.size("hidden_size"), inventory.size("num_attention_heads")
    kv_heads = inventory.size("num_key_value_heads") or heads
    inner = inventory.size("intermediate_size")
    width = inventory.size("head_dim") or (hidden // heads if hidden and heads else None)
    if hidden is None or heads is None or kv_heads is None or width is None:
        return
    gated = 2 if inventory.text_config.get("attn_output_gate") is True else 1
    wanted = {
        ".self_attn.q_proj": (heads * width * gated, hidden),
        ".self_attn.k_proj": (kv_heads * width, hidden),
        ".self_attn.v_proj": (kv_heads * width, hidden),
        ".self_attn.o_proj": (hidden, heads * width),
        ".mlp.gate_proj": (inner, hidden),
        ".mlp.up_proj": (inner, hidden),
        ".mlp.down_proj": (hidden, inner),
    }
    for name, (rows, columns) in _actual_sizes(inventory).items():
        end = next((end for end in wanted if name.endswith(end)), None)
        if end and None not in wanted[end] and (rows, columns) != wanted[end]:
            yield Place(name, f"{rows} by {columns}", f"{wanted[end]} by config.json", CONFIG)


def _actual_sizes(inventory: Inventory) -> dict[str, tuple[int, int]]:
    """Return rows and columns of linears, for models whose layers are all alike."""
    if inventory.text_config is not inventory.config or inventory.text_config.get("block_configs"):
        return {}
    model = str(inventory.config.get("model_type"))
    if model not in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "mixtral",
        "phi3",
        "granite",
        "gemma",
        "gemma2",
    ):
        return {}
    sizes = {}
    for name, parts in inventory.modules.items():
        weight = parts.get("weight")
        if weight is not None and len(weight.shape) == 2 and weight.shape[1] > 1:
            rows, columns = weight.shape
            # Model-Optimizer keeps two codes in a byte.
            sizes[name] = (rows, 2 * columns if weight.dtype == "U8" else columns)
    return sizes | {name: (own.rows, own.columns) for name, own, _ in layouts(inventory)}


def _tie(inventory: Inventory) -> Iterator[Place]:
    """A tie flag that the tensors contradict."""
    outer, inner = (c.get("tie_word_embeddings") for c in (inventory.config, inventory.text_config))
    if isinstance(outer, bool) and isinstance(inner, bool) and outer != inner:
        value = f"{outer}, and {inner} in text_config"
        yield Place("tie_word_embeddings", value, "one of the two", CONFIG)
    tied = _tied(inventory)
    head = inventory.modules.get("lm_head", {})
    embedding = next((n for n in inventory.tensors if n.endswith("embed_tokens.weight")), None)
    generates = any("CausalLM" in str(a) for a in _list(inventory.config.get("architectures")))
    if tied is False and generates and embedding is not None and not head:
        yield Place("lm_head.weight", "is missing", "a head: tie_word_embeddings is false")
    if tied is True and head and embedding is not None:
        own = head.get("weight")
        if own is None or not same_bytes(own, inventory.tensors[embedding]):
            value = "true, and lm_head is not the embedding"
            yield Place("tie_word_embeddings", value, "false, or no lm_head", CONFIG)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _indivisible(inventory: Inventory) -> Iterator[Place]:
    for name, group in inventory.groups.items():
        args, layout = group.weights, layout_of(group, inventory.modules[name])
        if args is None or layout is None or not args.group_size:
            continue
        if layout.columns % args.group_size:
            value = f"{layout.columns} inputs in groups of {args.group_size}"
            yield Place(name, value, "whole groups")


def _parallel(inventory: Inventory) -> Iterator[Place]:
    """Which degrees of tensor parallelism split no head, group, block or word."""
    reasons = {degree: _why_not(inventory, degree) for degree in DEGREES}
    works = [str(degree) for degree, reason in reasons.items() if reason is None]
    not_these = [f"{degree}: {reason}" for degree, reason in reasons.items() if reason]
    if inventory.groups and not_these:
        yield Place(
            "tensor parallelism", "; ".join(not_these), f"{', '.join(works) or 'none'} work"
        )


def _why_not(inventory: Inventory, degree: int) -> str | None:
    heads = inventory.size("num_attention_heads")
    kv_heads = inventory.size("num_key_value_heads") or heads
    if heads and heads % degree:
        return f"{heads} heads"
    if kv_heads and kv_heads % degree and degree % kv_heads:
        return f"{kv_heads} heads of keys"
    for name, group in inventory.groups.items():
        args, layout = group.weights, layout_of(group, inventory.modules[name])
        if args is None or layout is None:
            continue
        by_row = bool(ROW_PARALLEL.search(name))
        size = layout.columns if by_row else layout.rows
        unit = args.group_size or 1 if by_row else 1
        if args.block:
            unit = args.block[1] if by_row else args.block[0]
        elif by_row and format_of(group) == "pack-quantized" and groups_of_columns(args, size) == 1:
            unit = max(1, 32 // args.bits)
        if size % (degree * unit) and degree > 1:
            return f"{size} of {name.rpartition('.')[2]} in units of {unit}"
    return None


def _newer(inventory: Inventory) -> Iterator[Place]:
    """A compressed-tensors version newer than the one that would read it."""
    quantization = inventory.quantization
    if quantization is None or not quantization.version or not quantization.is_compressed_tensors:
        return
    installed = _installed("compressed-tensors")
    if installed and _release(quantization.version) > _release(installed):
        yield Place("version", quantization.version, f"at most {installed}, as installed", CONFIG)


def _rope_reader(inventory: Inventory) -> Iterator[Place]:
    """Rope in transformers 5's spelling, which 4 ignores in favour of the default of 10,000."""
    config = inventory.text_config
    if isinstance(config.get("rope_parameters"), dict) and "rope_theta" not in config:
        installed = _installed("transformers")
        if installed and _release(installed) < (5,):
            value = f"rope_parameters, and transformers is {installed}"
            yield Place("rope_theta", value, "transformers 5, or rope_theta itself", CONFIG)


@functools.cache
def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(version: str) -> tuple[int, ...]:
    """Return a version's leading numbers; () if it has none."""
    match = re.match(r"\d{1,6}(?:\.\d{1,6}){0,3}", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


RULES = (
    Rule(
        "config-differs",
        "error",
        "Another rope, norm epsilon, head count or window computes another model.",
        "vllm#42624, DeepSpeed#8345: rope_theta 500000 to 10000; the engine and any reference "
        "read the same wrong value",
        _differs,
        needs="base",
    ),
    Rule(
        "dtype-differs",
        "warning",
        "Another dtype than the base's rounds or overflows where the base does not.",
        "vllm#33972",
        _dtype,
        needs="base",
    ),
    Rule(
        "generation-differs",
        "error",
        "Another end-of-sequence id or temperature changes every answer, and no score.",
        "copies of generation_config.json from another model",
        _generation,
        needs="base",
    ),
    Rule(
        "vocabulary",
        "error",
        "Ids beyond the embedding read memory that is no token's.",
        "fine-tunes that added tokens to the tokenizer alone",
        _vocabulary,
    ),
    Rule(
        "vocabulary-padded",
        "note",
        "Padded rows are harmless, and whole distributions are compared on the base's part.",
        "common in the wild",
        _padded,
        needs="base",
    ),
    Rule(
        "config-sizes",
        "error",
        "A size that contradicts the tensors is served as nonsense.",
        "head_dim read from another model's config",
        _sizes,
    ),
    Rule(
        "tie-contradicted",
        "error",
        "A tied head that is stored too is dropped, an untied one that is missing is random.",
        "vllm#51063, transformers#43429, llm-compressor#1646",
        _tie,
    ),
    Rule(
        "group-indivisible",
        "error",
        "Inputs that are no whole number of groups have no kernel.",
        "vLLM's kernels ask for whole groups",
        _indivisible,
    ),
    Rule(
        "tensor-parallel",
        "note",
        "A degree that cuts a group, a block or a packed word is refused, or was sliced wrongly.",
        "vllm#53242, vllm#41511, TensorRT-LLM#8432, sglang#9433",
        _parallel,
    ),
    Rule(
        "version-newer",
        "warning",
        "A newer compressed-tensors may write what the installed one reads otherwise.",
        "compressed-tensors#809",
        _newer,
    ),
    Rule(
        "rope-spelling",
        "error",
        "transformers 4 does not know rope_parameters and takes a rope_theta of 10,000.",
        "vllm#42624, vllm#44158",
        _rope_reader,
    ),
)

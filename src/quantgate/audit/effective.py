"""What a config.json computes, however the version of transformers that wrote it spells it.

A later version states defaults that an earlier one left out, gathers rope's keys in one object, and
renames some. None of that is another model. A key that the base states and the checkpoint does not
is always a difference, unless it says nothing (None, False, 0).
"""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]

# Describes how the model was written, not what it computes.
NO_DIFFERENCE = frozenset(
    (
        *("quantization_config", "transformers_version", "_name_or_path", "_commit_hash"),
        *("use_cache", "dtype", "torch_dtype", "model_name", "_attn_implementation"),
        *("pretraining_tp", "initializer_range", "_from_model_config", "return_dict"),
        *("unsloth_fixed", "unsloth_version", "output_attentions", "output_hidden_states"),
        *("gradient_checkpointing", "classifier_dropout", "router_aux_loss_coef"),
        *("router_jitter_noise", "cache_implementation", "auto_map"),  # auto_map: `remote-code`
        *("sliding_window_pattern", "_sliding_window_pattern"),  # layer_types says it
        *("tie_word_embeddings", "vocab_size", "pad_token_id"),  # have their own rules, or none
    )
)
# Older keys of what is in rope_parameters now.
ROPE = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "rope_local_base_freq": "local_rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
ROPE_DEFAULTS = {
    "rope.rope_type": "default",
    "rope.local_rope_type": "default",
    "rope.partial_rotary_factor": 1.0,
}
# Every how many layers one has full attention, if the config does not say it.
PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
NOTHING = object()


def differences(own: Config, base: Config) -> Iterator[tuple[str, Any, Any]]:
    """Yield each key in which two configs compute different things, with both values.

    A key that one of them does not state has the value NOTHING there.
    """
    mine, bases, defaults = effective(own), effective(base), _defaults(base)
    for key in sorted(mine.keys() | bases.keys()):
        one, other = mine.get(key, NOTHING), bases.get(key, NOTHING)
        if other is NOTHING:
            same = one is None or (one == defaults[key] if key in defaults else not one)
        elif one is NOTHING:
            same = not other and key not in defaults
        else:
            same = one == other and isinstance(one, bool) == isinstance(other, bool)
        if not same:
            yield key, one, other


def effective(config: Config) -> dict[str, Any]:
    """Return what a config states: nested ones flattened, and one spelling for each key."""
    names = _known(config, "renamed")
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("rope_parameters", "rope_scaling", *ROPE, *NO_DIFFERENCE):
            continue
        if isinstance(value, dict) and key.endswith("_config"):
            flat |= {f"{key}.{inner}": v for inner, v in effective(value).items()}
        else:
            flat[str(names.get(key, key))] = value
    if "sliding_window" in flat and not _slides(config):
        flat["sliding_window"] = None
    return flat | {f"rope.{key}": value for key, value in _rope(config).items()}


def _slides(config: Config) -> bool:
    """Whether a stated window is used: some models have a switch for it."""
    default = not str(config.get("model_type")).startswith("qwen")
    return config.get("use_sliding_window", default) is not False


def _rope(config: Config) -> dict[str, Any]:
    """Return the rotary embedding parameters; those of local layers begin with `local_`."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        said = config.get(key)
        for name, value in said.items() if isinstance(said, dict) else ():
            if isinstance(value, dict):
                prefix = "local_" if name == "sliding_attention" else ""
                rope |= {f"{prefix}{inner}": v for inner, v in value.items()}
            else:
                rope[name] = value
    for key, name in ROPE.items():
        if key in config:
            rope.setdefault(name, config[key])
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    return rope if len(rope) > 1 else {}


def _defaults(config: Config) -> dict[str, Any]:
    """Return what the model's class takes for keys that a config does not state."""
    found = ROPE_DEFAULTS | _known(config, "defaults")
    stated = found | dict(config)
    heads, hidden = stated.get("num_attention_heads"), stated.get("hidden_size")
    if type(heads) is int and heads > 0 and type(hidden) is int:
        found = {"num_key_value_heads": heads, "head_dim": hidden // heads} | found
    found["layer_types"] = _layer_types(stated)
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            found |= {f"{key}.{inner}": v for inner, v in _defaults(value).items()}
    return found


def _layer_types(config: Config) -> list[str]:
    layers, kind = config.get("num_hidden_layers"), config.get("model_type")
    count = layers if type(layers) is int and 0 < layers < 1 << 12 else 0
    period = config.get("sliding_window_pattern", PATTERNS.get(str(kind)))
    full = count
    if type(period) is not int or period < 1:
        period = count + 1
        first = config.get("max_window_layers")
        slides = _slides(config) and config.get("sliding_window")
        full = first if slides and type(first) is int else count
    elif config.get("sliding_window"):
        full = 0
    return [
        "full_attention" if layer < full or (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(count)
    ]


def _known(config: Config, what: str) -> dict[str, Any]:
    kind = config.get("model_type")
    known: dict[str, Any] = _table().get(kind, {}) if isinstance(kind, str) else {}
    return dict(known.get(what, {}))


@functools.cache
def _table() -> dict[str, Any]:
    """Return what `tools/config_defaults.py` has written."""
    text = importlib.resources.files(__package__).joinpath("config_defaults.json").read_text()
    table: dict[str, Any] = json.loads(text)
    return table

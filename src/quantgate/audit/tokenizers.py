"""Rules that check the tokenizer against the config and, file by file, against the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantgate.audit.finding import Place, Rule
from quantgate.audit.inventory import Inventory

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE, SENTENCEPIECE = "chat_template.jinja", "tokenizer.model"
# The parts of a tokenizer that act on text, besides its vocabulary. Truncation and padding are set
# by the caller.
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Settings that older versions of the library do not write, and their defaults; of others, none.
DEFAULTS = {"use_regex": True, "trim_offsets": True, "split": True, "prepend_scheme": "always"}
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
# Changes ids.
SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "fix_mistral_regex",
    "split_special_tokens",
)
# Likewise, but not every version of transformers writes them.
WHERE_BOTH_SAY = (
    "clean_up_tokenization_spaces",
    "do_lower_case",
    "strip_accents",
    "tokenize_chinese_chars",
)
# Classes that take tokenizer.json as it is; others build a part of it themselves.
GENERIC = ("PreTrainedTokenizer", "TokenizersBackend")
LONGEST_TEMPLATE = 4_000_000


def _missing(inventory: Inventory) -> Iterator[Place]:
    present = [
        f
        for f in (TOKENIZER, SENTENCEPIECE, "vocab.json", "vocab.txt", "tekken.json")
        if (inventory.directory / f).exists()
    ]
    if inventory.config and inventory.modules and not present:
        yield Place(TOKENIZER, "is missing", "a tokenizer beside the weights")


def _ids(inventory: Inventory) -> Iterator[Place]:
    """Special token ids in the configs that differ from the tokenizer's."""
    ids = _vocabulary(inventory)
    named = _special_names(inventory)
    for token in ("bos_token", "eos_token"):
        name = named.get(token)
        said = [
            value
            for config in (inventory.text_config, inventory.document("generation_config.json"))
            for value in _list_of_ids(config.get(f"{token}_id"))
        ]
        if name in ids and said and ids[name] not in said:
            value = f"{', '.join(map(str, dict.fromkeys(said)))}"
            yield Place(f"{token}_id", value, f"{ids[name]}, the id of {name}", "config.json")


def _beyond(inventory: Inventory) -> Iterator[Place]:
    size = inventory.size("vocab_size")
    ids = _vocabulary(inventory)
    beyond = [(i, token) for token, i in ids.items() if size is not None and i >= size]
    if beyond:
        last, token = max(beyond)
        value = f"{token} has the id {last}, and {len(beyond)} tokens are beyond"
        yield Place("vocab_size", value, f"ids below {size}", TOKENIZER)
    for file in ("config.json", "generation_config.json"):
        config = inventory.text_config if file == "config.json" else inventory.document(file)
        for key in config if size is not None else ():
            ids_of_key = _list_of_ids(config[key]) if key.endswith("_token_id") else []
            if size is not None and any(i >= size for i in ids_of_key):
                yield Place(key, str(max(ids_of_key)), f"an id below {size}", file)


def _vocabulary_differs(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = _vocabulary(inventory), _vocabulary(inventory.base)
    if not own or not base:
        if base or (inventory.base.directory / SENTENCEPIECE).exists():
            yield from _file_differs(inventory, SENTENCEPIECE if not base else TOKENIZER)
        return
    moved = [(i, token) for token, i in base.items() if own.get(token) != i]
    if moved:
        i, token = min(moved)
        value = f"{token!r} is {own.get(token, 'missing')}; {len(moved)} tokens differ"
        yield Place(f"vocab: {token}", value, f"{i}, the base's", TOKENIZER)
    added = [token for token in own if token not in base]
    if added and not moved:
        value = f"{len(added)} tokens that the base has not, the first {added[0]!r}"
        yield Place("vocab", value, "the base's tokens", TOKENIZER)


def _special_differs(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = _added(inventory), _added(inventory.base)
    for name in sorted(own.keys() & base.keys()):
        if own[name] != base[name]:
            keys = [k for k in base[name] if own[name].get(k) != base[name][k]]
            for key in keys:
                value = f"{key} is {own[name].get(key)!r}"
                yield Place(f"added_tokens: {name}", value, f"{base[name][key]!r}", TOKENIZER)
    mine, bases = _special_names(inventory), _special_names(inventory.base)
    for name in sorted(own.keys() ^ base.keys()) if own else ():
        if name not in own:
            yield Place(f"added_tokens: {name}", "is missing", "the base's", TOKENIZER)
        elif name in _vocabulary(inventory.base) and name not in bases.values():
            value = "is an added token"
            yield Place(f"added_tokens: {name}", value, "an ordinary one, as the base's", TOKENIZER)
    for token in NAMES:
        if token in bases and token != "pad_token" and mine.get(token) != bases[token]:
            value = repr(mine.get(token, "nothing"))
            yield Place(token, value, f"{bases[token]!r}, the base's", TOKENIZER_CONFIG)


def _steps_differ(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = inventory.document(TOKENIZER), inventory.base.document(TOKENIZER)
    if own and base:
        for step in STEPS:
            if not _same_settings(own.get(step), base.get(step)):
                value = f"is {_kind(own.get(step))} with other settings"
                yield Place(step, value, f"{_kind(base.get(step))} as the base's", TOKENIZER)
        mine, bases = _model(own), _model(base)
        for key in sorted((mine.keys() | bases.keys()) - {"vocab", "merges"}):
            if not _same_settings({key: mine.get(key)}, {key: bases.get(key)}):
                yield Place(
                    f"model.{key}",
                    f"{mine.get(key)!r}",
                    f"{bases.get(key)!r}, the base's",
                    TOKENIZER,
                )
        if _merges(own) != _merges(base):
            yield Place("model.merges", f"{len(_merges(own))} merges", "the base's", TOKENIZER)
    settings, bases = (
        inventory.document(TOKENIZER_CONFIG),
        inventory.base.document(TOKENIZER_CONFIG),
    )
    stated = [key for key in WHERE_BOTH_SAY if key in settings.keys() & bases.keys()]
    for key in (*SETTINGS, *stated) if settings and bases else ():
        if (settings.get(key) or False) != (bases.get(key) or False):
            yield Place(key, repr(settings.get(key)), repr(bases.get(key)), TOKENIZER_CONFIG)
    own_class, base_class = (_class(said) for said in (settings, bases))
    if own_class and base_class and own_class not in (base_class, *GENERIC):
        value = f"{own_class}, which may build a part of it by itself"
        yield Place("tokenizer_class", value, f"{base_class}, the base's", TOKENIZER_CONFIG)


def _template_differs(inventory: Inventory) -> Iterator[Place]:
    if inventory.base is None:
        return
    own, base = chat_template(inventory), chat_template(inventory.base)
    if base is not None and own is None:
        yield Place("chat_template", "is missing", "the base's", TOKENIZER_CONFIG)
    elif own != base:
        place = next(
            (i for i, (a, b) in enumerate(zip(own or "", base or "", strict=False)) if a != b), 0
        )
        value = f"differs from character {place}: {(own or '')[place : place + 40]!r}"
        expected = f"{(base or '')[place : place + 40]!r}, the base's"
        yield Place("chat_template", value, expected, TOKENIZER_CONFIG)


def _file_differs(inventory: Inventory, name: str) -> Iterator[Place]:
    own, base = inventory.directory / name, (inventory.base or inventory).directory / name
    if not own.is_file():
        yield Place(name, "is missing", "the base's", name)
    elif base.is_file() and own.read_bytes() != base.read_bytes():
        yield Place(name, "has other bytes", "the base's", name)


def chat_template(inventory: Inventory) -> str | None:
    """Return a checkpoint's chat template from any of the places it may be kept in, or None."""
    path = inventory.directory / TEMPLATE
    if path.is_file() and path.stat().st_size < LONGEST_TEMPLATE:
        return path.read_text(encoding="utf-8", errors="replace")
    said = inventory.document(TOKENIZER_CONFIG).get("chat_template")
    if isinstance(said, list):
        said = next((t.get("template") for t in said if isinstance(t, dict)), None)
    return said if isinstance(said, str) else None


def _vocabulary(inventory: Inventory) -> dict[str, int]:
    """Return the id of every token in tokenizer.json; {} if it cannot be read."""
    model = inventory.document(TOKENIZER).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, int] = {}
    if isinstance(vocabulary, dict):
        ids = {token: i for token, i in vocabulary.items() if type(i) is int}
    elif isinstance(vocabulary, list):  # a unigram model: pieces with their scores
        pieces = (p[0] for p in vocabulary if isinstance(p, list) and p and isinstance(p[0], str))
        ids = {piece: i for i, piece in enumerate(pieces)}
    return ids | {name: token["id"] for name, token in _added(inventory).items()}


def _added(inventory: Inventory) -> dict[str, dict[str, Any]]:
    """Return the added tokens by name, each with an id."""
    said = inventory.document(TOKENIZER).get("added_tokens")
    return {
        token["content"]: token
        for token in (said if isinstance(said, list) else ())
        if isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
    }


def _special_names(inventory: Inventory) -> dict[str, str]:
    """Return the names of special tokens by role."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", TOKENIZER_CONFIG):
        for key in NAMES:
            said = inventory.document(file).get(key)
            said = said.get("content") if isinstance(said, dict) else said
            if isinstance(said, str):
                names[key] = said
    return names


def _list_of_ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _class(settings: Mapping[str, Any]) -> str:
    """Return the name of a tokenizer's class, whichever of its two spellings is used."""
    said = settings.get("tokenizer_class")
    return said.removesuffix("Fast") if isinstance(said, str) else ""


def _kind(step: Any) -> str:
    return str(step.get("type")) if isinstance(step, dict) else "nothing"


def _model(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    said = tokenizer.get("model")
    return said if isinstance(said, dict) else {}


def _same_settings(own: Any, base: Any) -> bool:
    """Whether two steps do the same: a key that only one spells out must have its default."""
    if isinstance(own, dict) and isinstance(base, dict):
        return all(
            _same_settings(own.get(key, _default(key)), base.get(key, _default(key)))
            for key in own.keys() | base.keys()
        )
    if isinstance(own, list) and isinstance(base, list):
        return len(own) == len(base) and all(map(_same_settings, own, base))
    return bool(own == base) or (not own and not base)


def _default(key: str) -> Any:
    return DEFAULTS.get(key)


def _merges(tokenizer: Mapping[str, Any]) -> list[str]:
    """Return a tokenizer's merges in the older of the two spellings."""
    said = _model(tokenizer).get("merges")
    merges = said if isinstance(said, list) else []
    return [" ".join(map(str, pair)) if isinstance(pair, list) else str(pair) for pair in merges]


RULES = (
    Rule(
        "tokenizer-missing",
        "warning",
        "A checkpoint without its tokenizer is served with another's.",
        "llm-compressor scripts that save the model alone",
        _missing,
    ),
    Rule(
        "token-ids",
        "warning",
        "A model that waits for another end of sequence never stops, or never starts.",
        "lm-eval#1465: a missing BOS, perplexity 5.9e9",
        _ids,
    ),
    Rule(
        "tokens-beyond",
        "error",
        "An id beyond the vocabulary reads memory that is no token's.",
        "tokens added to the tokenizer and not to the model",
        _beyond,
    ),
    Rule(
        "vocabulary-differs",
        "error",
        "Tokens with other ids make another text of every prompt; all scores are of that text.",
        "transformers#42299: token ids that moved",
        _vocabulary_differs,
        needs="base",
    ),
    Rule(
        "special-tokens-differ",
        "error",
        "Exchanged special tokens begin and end texts where they do not.",
        "lm-eval#1465, lm-eval#2049",
        _special_differs,
        needs="base",
    ),
    Rule(
        "tokenizer-differs",
        "error",
        "Another pre-tokenizer or set of merges cuts words elsewhere.",
        "transformers#42299, transformers#42591, Tokenicer#61: Mistral's expression",
        _steps_differ,
        needs="base",
    ),
    Rule(
        "chat-template-differs",
        "error",
        "Another template puts other tokens around every message.",
        "lm-eval#3333: BOS twice or not at all",
        _template_differs,
        needs="base",
    ),
)

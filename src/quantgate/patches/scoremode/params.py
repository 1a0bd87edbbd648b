"""`SamplingParams(score_mode=True)`: the request side of score mode."""

from types import ModuleType
from typing import Any

from quantgate.patches.scoremode.hooks import HTTP, hook, refuse_if_off
from quantgate.patches.scoremode.request import SCORE_KEY, TARGETS, is_score_request

NO_BEAM_SEARCH = "score_mode must be left out with beam search, which generates; got True."
FIELDS = ("score_mode", "score_start", "score_hidden_states")


def patch_sampling_params(module: ModuleType) -> None:
    """Replace `vllm.sampling_params.SamplingParams` with a subclass that has `score_mode`.

    A `msgspec.Struct` cannot gain fields in place. The subclass keeps the wire format: in a
    process that decodes before this patch is applied, vLLM's own class ignores the extra fields,
    and the request itself is in `extra_args`.
    """
    stock: Any = module.SamplingParams

    class SamplingParams(stock, omit_defaults=True, dict=True):  # type: ignore[misc, call-arg]
        """vLLM's `SamplingParams` with quantgate's score mode.

        `score_mode=True` returns the natural log-probability of every prompt token from the
        second on, in float32, and generates nothing. Only then may `max_tokens` be 0.
        `score_start` is the first row to score (row i predicts prompt token i + 1); the prefix
        cache is read up to it. `score_hidden_states=True` also returns the last hidden states of
        the scored rows. `prompt_logprobs=1` adds the most probable token to each row's dict. Over
        HTTP, set the same names in `vllm_xargs`.
        """

        score_mode: bool = False
        score_start: int = 0
        score_hidden_states: bool = False

        def __post_init__(self) -> None:
            _read_request_arguments(self)
            if self.score_mode and not is_score_request(self):  # else copied, or received
                _prepare_for_scoring(self)
            elif not self.score_mode and self.max_tokens == 0:
                raise ValueError("max_tokens=0 is allowed with score_mode=True only, got 0.")
            super().__post_init__()

        @property
        def beam_width(self) -> int:
            """Refuse `LLM.beam_search`, which reads this attribute of its parameters."""
            if self.score_mode:
                raise ValueError(NO_BEAM_SEARCH)
            raise AttributeError("SamplingParams has no beam_width; use BeamSearchParams.")

        @staticmethod
        def from_optional(*arguments: Any, **options: Any) -> Any:
            """Return vLLM's `from_optional`, extended by score mode's fields."""
            ours = {name: options.pop(name) for name in FIELDS if name in options}
            if ours.get("score_mode") and options.get("max_tokens") == 0:
                options["max_tokens"] = 1
            params = stock.from_optional(*arguments, **options)
            for name, value in ours.items():
                setattr(params, name, value)
            if params.score_mode:
                _prepare_for_scoring(params)
            return params

    SamplingParams.__module__ = stock.__module__
    SamplingParams.__qualname__ = stock.__qualname__
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    _patch_beam_search_params(module)
    # If vLLM was imported first (an engine core), it keeps creating objects of its own class,
    # which pickle would no longer find under that name.
    stock.__reduce__ = _reduce


def _patch_beam_search_params(module: ModuleType) -> None:
    stock: Any = module.BeamSearchParams

    class BeamSearchParams(stock, omit_defaults=True, dict=True):  # type: ignore[misc, call-arg]
        """vLLM's `BeamSearchParams`, which refuses `score_mode` by name."""

        score_mode: bool = False

        def __post_init__(self) -> None:
            if self.score_mode:
                raise ValueError(NO_BEAM_SEARCH)
            super().__post_init__()

    BeamSearchParams.__module__, BeamSearchParams.__qualname__ = (
        stock.__module__,
        stock.__qualname__,
    )
    module.BeamSearchParams = BeamSearchParams  # type: ignore[attr-defined]


@hook(
    "vllm.entrypoints.openai.completion.protocol",
    "CompletionRequest.to_beam_search_params",
    feature=HTTP,
)
def to_beam_search_params(stock: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuse a completion request that combines beam search with scoring in `vllm_xargs`."""
    if (getattr(request, "vllm_xargs", None) or {}).get("score_mode"):
        raise ValueError(NO_BEAM_SEARCH)
    return stock(*args, **kwargs)


def _reduce(params: Any) -> tuple[Any, ...]:
    return _rebuild, tuple(getattr(params, name) for name in params.__struct_fields__)


def _rebuild(*values: Any) -> Any:
    from vllm.sampling_params import SamplingParams

    return SamplingParams(*values)


def _read_request_arguments(params: Any) -> None:
    """Read score mode's fields from `extra_args`, where a server puts `vllm_xargs`."""
    given = dict(params.extra_args or {})
    if "score_mode" not in given:
        return
    params.extra_args = {name: value for name, value in given.items() if name not in FIELDS}
    params.score_mode = _flag(given["score_mode"])
    if not params.score_mode:
        return
    params.score_start = given.get("score_start", 0)
    if given.get("score_hidden_states"):
        raise ValueError(
            "score_hidden_states is not for vllm_xargs: an OpenAI response has no field for it; "
            f"got {given['score_hidden_states']!r}."
        )
    if params.logprobs is not None and TARGETS in given:
        raise ValueError(
            f"{TARGETS} cannot be combined with logprobs, which score the prompt's own tokens; "
            "leave logprobs out and read prompt_logprobs."
        )
    params.logprobs = None  # here OpenAI's parameter asks for the echoed prompt's
    params.extra_args[SCORE_KEY] = {"as_list": True}  # a JSON response needs a plain list


def _flag(value: Any) -> bool:
    """Parse a boolean sent as 1, 1.0, true or "true"; JSON clients send all of them."""
    meaning = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    try:
        return meaning[str(value).lower()]
    except KeyError:
        raise ValueError(f"score_mode must be true or false; got {value!r}.") from None


def _prepare_for_scoring(params: Any) -> None:
    refuse_if_off("vllm.v1.engine.input_processor")
    _refuse_what_scoring_cannot_do(params)
    # The engine samples once at the end of every prompt; `outputs` drops that token.
    params.max_tokens = 1
    params.ignore_eos = True
    params.prompt_logprobs = params.prompt_logprobs or 0
    # A server's response contains token texts.
    params.detokenize = bool((params.extra_args or {}).get(SCORE_KEY, {}).get("as_list"))
    # Only rows before the first scored one may come from the prefix cache.
    params.skip_reading_prefix_cache = params.score_start == 0
    # `inputs` stores the request itself here once the prompt is known.
    params.extra_args = {SCORE_KEY: {}, **(params.extra_args or {})}


def _refuse_what_scoring_cannot_do(params: Any) -> None:
    generates_nothing = "with score_mode=True, which generates no token"
    refusals = {
        "n": (params.n != 1, "must be 1 with score_mode=True"),
        "max_tokens": (params.max_tokens not in (0, 1, 16, None), f"must be 0 {generates_nothing}"),
        "prompt_logprobs": (
            params.prompt_logprobs not in (None, 0, 1),
            "must be 0, or 1 for the most probable token as well, with score_mode=True",
        ),
        "logprobs": (params.logprobs is not None, f"must be left out {generates_nothing}"),
        "stop": (bool(params.stop), f"must be left out {generates_nothing}"),
        "score_start": (
            not isinstance(params.score_start, int) or params.score_start < 0,
            "must be an integer of at least 0",
        ),
    }
    for name, (refused, reason) in refusals.items():
        if refused:
            raise ValueError(f"{name} {reason}; got {getattr(params, name)!r}.")

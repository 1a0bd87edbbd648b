"""`SamplingParams(score_mode=True)`: the request side of score mode."""

from types import ModuleType
from typing import Any

from quantgate.scoremode.request import SCORE_KEY


def patch_sampling_params(module: ModuleType) -> None:
    """Replace `vllm.sampling_params.SamplingParams` by a subclass that knows `score_mode`.

    A `msgspec.Struct` takes no new field in place. The subclass keeps the wire format: vLLM's
    own class, in a process that decodes before this patch is there, ignores the extra fields, and
    the request itself travels in `extra_args`.
    """
    stock: Any = module.SamplingParams

    class SamplingParams(stock, omit_defaults=True, dict=True):  # type: ignore[misc, call-arg]
        """vLLM's `SamplingParams` with quantgate's score mode.

        `score_mode=True` returns the natural-log probability of every prompt token from the
        second on, in float32, and generates nothing. `max_tokens=0` is allowed there, and only
        there. `score_start` is the first row to score (row i predicts prompt token i + 1); the
        prefix cache is read up to it. `score_hidden_states=True` returns the last hidden states of
        the scored rows as well.
        """

        score_mode: bool = False
        score_start: int = 0
        score_hidden_states: bool = False

        def __post_init__(self) -> None:
            if self.score_mode:
                _prepare_for_scoring(self)
            elif self.max_tokens == 0:
                raise ValueError("max_tokens=0 is allowed with score_mode=True only, got 0.")
            super().__post_init__()

    SamplingParams.__module__ = stock.__module__
    SamplingParams.__qualname__ = stock.__qualname__
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    # Where vLLM was imported first (an engine core), it goes on making objects of its own class,
    # which pickle would no longer find under its name.
    stock.__reduce__ = _reduce


def _reduce(params: Any) -> tuple[Any, ...]:
    return _rebuild, tuple(getattr(params, name) for name in params.__struct_fields__)


def _rebuild(*values: Any) -> Any:
    from vllm.sampling_params import SamplingParams

    return SamplingParams(*values)


def _prepare_for_scoring(params: Any) -> None:
    _refuse_what_scoring_cannot_do(params)
    # The engine samples once at the end of every prompt; `outputs` drops that token.
    params.max_tokens = 1
    params.ignore_eos = True
    params.prompt_logprobs = 0
    params.detokenize = False
    # Rows before the first scored one may come from the prefix cache.
    params.skip_reading_prefix_cache = params.score_start == 0
    # `inputs` puts the request itself here, once the prompt is known.
    params.extra_args = {SCORE_KEY: {}, **(params.extra_args or {})}


def _refuse_what_scoring_cannot_do(params: Any) -> None:
    generates_nothing = "with score_mode=True, which generates no token"
    refusals = {
        "n": (params.n != 1, "must be 1 with score_mode=True"),
        "max_tokens": (params.max_tokens not in (0, 1, 16, None), f"must be 0 {generates_nothing}"),
        "prompt_logprobs": (
            params.prompt_logprobs not in (None, 0),
            "must be left out with score_mode=True, which returns each prompt token's own",
        ),
        "logprobs": (params.logprobs is not None, f"must be left out {generates_nothing}"),
        "stop": (bool(params.stop), f"must be left out {generates_nothing}"),
        "score_start": (params.score_start < 0, "must be at least 0"),
    }
    for name, (refused, reason) in refusals.items():
        if refused:
            raise ValueError(f"{name} {reason}; got {getattr(params, name)!r}.")

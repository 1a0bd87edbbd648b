"""`SamplingParams(score_mode=True)`: the request side of score mode."""

from types import ModuleType
from typing import Any

# The key in `SamplingParams.extra_args`, the one field that crosses to the worker unchanged.
SCORE_KEY = "quantgate_score"


def is_score_request(sampling_params: Any) -> bool:
    """Whether a vLLM `SamplingParams` (or None, for pooling requests) asks for score mode."""
    extra_args = getattr(sampling_params, "extra_args", None)
    return bool(extra_args and extra_args.get(SCORE_KEY))


def patch_sampling_params(module: ModuleType) -> None:
    """Replace `vllm.sampling_params.SamplingParams` by a subclass that knows `score_mode`.

    A `msgspec.Struct` takes no new field in place. The subclass keeps the wire format: vLLM's
    own class, in a process that decodes before this patch is there, ignores the extra field, and
    the request itself travels in `extra_args`.
    """
    stock: Any = module.SamplingParams

    class SamplingParams(stock, omit_defaults=True, dict=True):  # type: ignore[misc, call-arg]
        """vLLM's `SamplingParams` with quantgate's `score_mode`.

        `score_mode=True` returns the natural-log probability of every prompt token from the
        second on, in float32, and generates nothing. `max_tokens=0` is allowed there, and only
        there.
        """

        score_mode: bool = False

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
    params.prompt_logprobs = 0
    params.detokenize = False
    params.extra_args = {**(params.extra_args or {}), SCORE_KEY: True}


def _refuse_what_scoring_cannot_do(params: Any) -> None:
    if params.n != 1:
        raise ValueError(f"n must be 1 with score_mode=True, got {params.n}.")
    if params.prompt_logprobs not in (None, 0):
        raise ValueError(
            "prompt_logprobs must be left out with score_mode=True, which returns each prompt "
            f"token's own log-probability; got {params.prompt_logprobs}."
        )
    if params.logprobs is not None:
        raise ValueError(
            "logprobs must be left out with score_mode=True, which generates no token; "
            f"got {params.logprobs}."
        )
    if params.stop:
        raise ValueError(
            "stop must be left out with score_mode=True, which generates no token; "
            f"got {params.stop!r}."
        )

"""Check scoring requests as they enter the engine, and attach what they ask for."""

import copy
import functools
from typing import Any

from quantgate.patches.scoremode.hooks import hook, require_hooks
from quantgate.patches.scoremode.request import SCORE_KEY, TARGETS, make_score_request

# Set on an input processor whose engine has all hooks.
CHECKED = "_quantgate_checked"


@hook("vllm.renderers.base", "BaseRenderer._process_tokens")
def process_tokens(stock: Any, renderer: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    """Pass `TokensPrompt(target_token_ids=…)` on to the input processor."""
    return _with_targets(stock(prompt, *args, **kwargs), prompt)


@hook("vllm.renderers.base", "BaseRenderer._process_tokens_async")
async def process_tokens_async(
    stock: Any, renderer: Any, prompt: Any, *args: Any, **kwargs: Any
) -> Any:
    """Pass `TokensPrompt(target_token_ids=…)` on to the input processor."""
    return _with_targets(await stock(prompt, *args, **kwargs), prompt)


def _with_targets(engine_input: Any, prompt: Any) -> Any:
    if isinstance(prompt, dict) and (targets := prompt.get(TARGETS)) is not None:
        engine_input[TARGETS] = targets
    return engine_input


@hook("vllm.v1.engine.input_processor", "InputProcessor.process_inputs")
def process_inputs(
    stock: Any,
    processor: Any,
    request_id: Any,
    prompt: Any,
    params: Any,
    supported_tasks: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Check every scoring request in the caller's process, before the engine sees it."""
    if not getattr(params, "score_mode", False):
        if isinstance(prompt, dict) and prompt.get(TARGETS) is not None:
            raise _bad_request(f"{TARGETS} needs SamplingParams(score_mode=True).")
        return stock(request_id, prompt, params, supported_tasks, *args, **kwargs)
    _require_hooks_once(processor)
    try:
        prompt, params = _scoring_inputs(
            processor, prompt, params, supported_tasks, kwargs.get("tokenization_kwargs")
        )
    except ValueError as error:
        raise _bad_request(str(error)) from None
    return stock(request_id, prompt, params, supported_tasks, *args, **kwargs)


def _require_hooks_once(processor: Any) -> None:
    """Refuse an engine that lacks hooks; check each engine once, not on every request.

    The property that names the model runner takes 10 ms on CUDA, where it searches all installed
    packages.
    """
    if CHECKED not in vars(processor):
        require_hooks(processor.vllm_config)
        setattr(processor, CHECKED, True)


def _scoring_inputs(
    processor: Any, prompt: Any, params: Any, tasks: Any, tokenization: dict[str, Any] | None
) -> tuple[Any, Any]:
    """Return the prompt and parameters to pass to the engine for a scoring request."""
    if "generate" not in tasks:
        raise ValueError(
            f"score_mode=True needs a model that generates; this one is served for {tasks}."
        )
    rendered = _rendered(processor, prompt, tokenization)
    ids = rendered["prompt_token_ids"]
    model_config = processor.model_config
    if len(ids) > model_config.max_model_len:
        raise ValueError(
            f"prompt_token_ids has {len(ids)} tokens, but max_model_len is "
            f"{model_config.max_model_len}."
        )
    params = copy.copy(params)
    # vLLM deep-copies parameters unless skip_clone is set. It only modifies this set, so copying
    # the set is enough to leave the caller's parameters unchanged.
    params.skip_clone = True
    params._all_stop_token_ids = set(params._all_stop_token_ids)
    extra = dict(params.extra_args)
    request = make_score_request(
        ids,
        rendered.get(TARGETS, extra.pop(TARGETS, None)),
        start=params.score_start,
        vocab_size=model_config.get_vocab_size(),
        hidden_states=params.score_hidden_states,
        top1=params.prompt_logprobs == 1,
        as_list=extra[SCORE_KEY].get("as_list", False),
    )
    params.extra_args = {**extra, SCORE_KEY: request.to_wire()}
    given = ids if request.last_token is None else ids[:-1]
    return {**rendered, "prompt_token_ids": given}, params


def _bad_request(message: str) -> ValueError:
    """Return a `ValueError` that vLLM's server answers with 400 and AsyncLLM raises unchanged."""
    return _bad_request_type()(message)


@functools.cache
def _bad_request_type() -> type[ValueError]:
    from vllm.exceptions import VLLMValidationError

    # It is a ValueError in vLLM 0.26, but not in 0.32.
    return type("ScoreRequestError", (VLLMValidationError, ValueError), {})


def _rendered(processor: Any, prompt: Any, tokenization: dict[str, Any] | None) -> Any:
    """Return the prompt in the engine's form; raw prompts are rendered as vLLM renders them."""
    if not (isinstance(prompt, dict) and "type" in prompt):
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        renderer = processor.renderer
        (prompt,) = renderer.render_cmpl(
            [parse_model_prompt(processor.model_config, prompt)],
            renderer.default_cmpl_tok_params.with_kwargs(**(tokenization or {})),
        )
    if prompt["type"] != "token":
        raise ValueError(f"score_mode=True takes token prompts only, got type {prompt['type']!r}.")
    return prompt

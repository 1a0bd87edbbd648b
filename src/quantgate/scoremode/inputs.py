"""Where requests enter the engine: attach to each scoring request what it asks for."""

from types import ModuleType
from typing import Any

from quantgate.scoremode.hooks import replace_method, require_hooks
from quantgate.scoremode.request import SCORE_KEY, make_score_request

TARGETS = "target_token_ids"


def patch_renderer(module: ModuleType) -> None:
    """Let `TokensPrompt(target_token_ids=…)` through to the input processor."""

    def process_tokens(stock: Any, renderer: Any, prompt: Any, **options: Any) -> Any:
        return _with_targets(stock(prompt, **options), prompt)

    async def process_tokens_async(stock: Any, renderer: Any, prompt: Any, **options: Any) -> Any:
        return _with_targets(await stock(prompt, **options), prompt)

    replace_method(module, "BaseRenderer._process_tokens", process_tokens)
    replace_method(module, "BaseRenderer._process_tokens_async", process_tokens_async)


def _with_targets(engine_input: Any, prompt: Any) -> Any:
    if (targets := prompt.get(TARGETS)) is not None:
        engine_input[TARGETS] = targets
    return engine_input


def patch_input_processor(module: ModuleType) -> None:
    """Check every scoring request in the caller's process, before the engine sees it."""

    def process_inputs(
        stock: Any, processor: Any, request_id: str, prompt: Any, params: Any, *rest: Any, **kw: Any
    ) -> Any:
        if not getattr(params, "score_mode", False):
            if isinstance(prompt, dict) and prompt.get(TARGETS) is not None:
                raise ValueError(f"{TARGETS} needs SamplingParams(score_mode=True).")
            return stock(request_id, prompt, params, *rest, **kw)
        require_hooks()
        tasks = kw.get("supported_tasks", rest[0] if rest else ())
        if "generate" not in tasks:
            raise ValueError(
                f"score_mode=True needs a model that generates; this one is served for {tasks}."
            )
        rendered = _rendered(processor, prompt, kw.get("tokenization_kwargs"))
        ids = rendered["prompt_token_ids"]
        model_config = processor.model_config
        if len(ids) > model_config.max_model_len:
            raise ValueError(
                f"prompt_token_ids has {len(ids)} tokens, but max_model_len is "
                f"{model_config.max_model_len}."
            )
        request = make_score_request(
            ids,
            rendered.get(TARGETS),
            start=params.score_start,
            hidden_states=params.score_hidden_states,
            vocab_size=model_config.get_vocab_size(),
        )
        params = params.clone()
        params.extra_args = {**params.extra_args, SCORE_KEY: request.to_wire()}
        given = ids if request.last_token is None else ids[:-1]
        return stock(request_id, {**rendered, "prompt_token_ids": given}, params, *rest, **kw)

    replace_method(module, "InputProcessor.process_inputs", process_inputs)


def _rendered(processor: Any, prompt: Any, tokenization: dict[str, Any] | None) -> Any:
    """Return the prompt as the engine takes it; raw ones are rendered as vLLM would."""
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

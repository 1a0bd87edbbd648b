"""Additions to vLLM's pooling models: their original spelling, and heads in full precision.

    LLM(model=…, task="token_classification", model_config={"num_labels": 5})
    llm.encode(text)[0].data

is the same as `runner="pooling"`, `pooler_config={"task": "token_classify", "use_activation":
False}` and `encode(text, pooling_task="token_classify")[0].outputs.data`. `num_labels` is checked
against the checkpoint before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from quantgate.formats.groups import group_of
from quantgate.patches.scoremode.hooks import POOLING, hook
from quantgate.subject.task import GENERATE, HEADS, label_names, num_labels, task_of

# The tasks of the original spelling; both return logits for each token.
TOKEN_TASKS = ("token_classification", "token_reward")
# What marks a head that vLLM would have loaded wrong: `get_quant_method` says why.
REPAIRED_HEAD = "quantgate_repaired_head"
COMPRESSED_TENSORS = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"


@hook("vllm.entrypoints.llm", "LLM.__init__", feature=POOLING)
def init(stock: Any, llm: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let `LLM` accept `task=` and `model_config=`."""
    task = kwargs.pop("task", None)
    if task is None:
        return stock(model, *args, **kwargs)
    settings = kwargs.pop("model_config", None) or {}
    started = stock(model, *args, **{**token_task_options(model, task, settings), **kwargs})
    llm.token_task = task
    return started


@hook("vllm.entrypoints.llm", "LLM.encode", feature=POOLING)
def encode(
    stock: Any, llm: Any, prompts: Any, *args: Any, pooling_task: Any = None, **kwargs: Any
) -> Any:
    """Make the engine's task the default of `LLM.encode`."""
    if pooling_task is None:
        pooler = llm.llm_engine.model_config.pooler_config
        pooling_task = pooler and pooler.task
    if hasattr(llm, "token_task"):
        refuse_empty(prompts)
    return stock(prompts, *args, pooling_task=pooling_task, **kwargs)


def token_task_options(model: Any, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `LLM` for a task in the original spelling, or raise a `ValueError`.

    `settings` may hold `num_labels`, which must match the checkpoint.
    """
    if task not in TOKEN_TASKS:
        raise ValueError(
            f"task='{task}' is not one of {', '.join(TOKEN_TASKS)}; give vLLM's own tasks as "
            'runner="pooling" and pooler_config={"task": …}.'
        )
    if unknown := sorted(set(settings) - {"num_labels"}):
        raise ValueError(f"model_config takes num_labels only, got {', '.join(unknown)}.")
    config = _config_of(model)
    architectures = ", ".join(config.get("architectures") or ["model of unknown architecture"])
    if task_of(config) in (GENERATE, "token_embed"):
        raise ValueError(
            f"{model}: a {architectures} has no head for labels; task='{task}' is for a checkpoint "
            "that was trained as a token classifier or a reward model."
        )
    held = num_labels(config)
    given = settings.get("num_labels", held)
    if given != held:
        names = ", ".join(label_names(config)[:8])
        raise ValueError(
            f"{model}: num_labels is {given!r}, but the checkpoint has {held} labels"
            + (f" ({names})" if names else "")
            + "; leave num_labels out, or correct it."
        )
    pooler = {"task": "token_classify", "tok_pooling_type": "ALL", "use_activation": False}
    return {"runner": "pooling", "pooler_config": pooler}


def _config_of(model: Any) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        config: dict[str, Any] = PretrainedConfig.get_config_dict(str(model))[0]
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model}: its config.json cannot be read ({reason}).") from None
    return config


def refuse_empty(prompts: Any) -> None:
    """Raise a `ValueError` if a prompt is empty, because it has no token to label."""
    for number, prompt in enumerate(_each(prompts)):
        content = prompt
        if isinstance(prompt, Mapping):
            content = prompt.get("prompt_token_ids") or prompt.get("prompt")
        if not content:
            raise ValueError(f"prompt {number} is empty; there is no token in it to label.")


def _each(prompts: Any) -> Iterator[Any]:
    one = isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int))
    yield from [prompts] if one else prompts


def patch_outputs(module: Any) -> None:
    """Add `data` to `PoolingRequestOutput`, unless this vLLM has it already."""
    if hasattr(module.PoolingRequestOutput, "data"):
        return
    module.PoolingRequestOutput.data = property(lambda output: output.outputs.data)


@hook(COMPRESSED_TENSORS, "CompressedTensorsConfig.get_quant_method", feature=POOLING)
def get_quant_method(
    stock: Any, config: Any, layer: Any, prefix: Any, *args: Any, **kwargs: Any
) -> Any:
    """Keep the heads of pooling models in full precision.

    vLLM 0.32.0 gives a reward model's head no name that `ignore` could match, so it would load the
    head as a quantized layer, which fails or gives NaN. A head that is quantized on disk cannot be
    served correctly with a bias and is refused.
    """
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    if not _is_head(prefix) or not isinstance(layer, LinearBase):
        return stock(layer, prefix, *args, **kwargs)
    named = {"config_groups": {"group": {"targets": ["Linear"]}}, "ignore": config.ignore}
    if not prefix:
        setattr(layer, REPAIRED_HEAD, True)
    kept = [name for name in HEADS if group_of(name, "Linear", named) is None]
    if prefix in kept or (not prefix and kept):
        return UnquantizedLinearMethod()
    raise ValueError(
        f"the head '{prefix or 'score'}' is quantized, which vLLM cannot serve with a bias: "
        "quantize the model again with its head in `ignore`."
    )


def _is_head(prefix: str) -> bool:
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    runner = getattr(getattr(config, "model_config", None), "runner_type", None)
    return runner == "pooling" and (not prefix or prefix in HEADS)

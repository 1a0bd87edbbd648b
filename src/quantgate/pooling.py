"""Pooling models in vLLM: how an engine is told what a checkpoint does, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.checkpoint import BadInput, read_config
from quantgate.probe import Probe
from quantgate.task import EMBED, GENERATE, POOLING, SEQUENCE_REWARD, Task, task_of

if TYPE_CHECKING:
    from vllm import LLM, PoolingParams

Rows = NDArray[np.float32]


def pooling_arguments(
    directory: Path, task: Task, *, step_tag_id: int | None = None
) -> dict[str, Any]:
    """Return what `vllm.LLM` is given besides, for a task; {} for one that generates.

    With `step_tag_id` a token classifier gives the rows of that token only (vLLM's STEP pooling),
    otherwise every row.
    """
    if task == GENERATE:
        return {}
    pooler: dict[str, Any] = {"task": POOLING[task].task}
    if task != SEQUENCE_REWARD:
        pooler["tok_pooling_type"] = "ALL" if step_tag_id is None else "STEP"
    if step_tag_id is not None:
        pooler["step_tag_id"] = step_tag_id
    arguments: dict[str, Any] = {"runner": "pooling", "pooler_config": pooler}
    if task == EMBED and task_of(read_config(directory)) == GENERATE:
        arguments["convert"] = "embed"
    return arguments


def refuse_another_task(directory: Path, task: Task) -> None:
    """Raise `BadInput` where a checkpoint cannot do a task: it has no head for it, or another."""
    does = task_of(read_config(directory))
    if does == task or task == EMBED:
        return
    if does == "token_classify" and task == "token_reward":
        return  # a process reward model as TRL saves it
    architectures = ", ".join(read_config(directory).get("architectures") or ["unknown"])
    raise BadInput(
        f"{directory / 'config.json'}: a {architectures} does '{does}', not '{task}'"
        + ("; it has no head for labels." if does == GENERATE else ".")
    )


def outputs(llm: LLM, probe: Probe) -> tuple[Rows, Rows]:
    """Return raw and activated outputs [n, D] of a probe's rows.

    All requests of both kinds are in one batch, in turns, so that a parameter which leaks from one
    request to another shows in both.
    """
    from vllm import PoolingParams

    ids = [window.ids for window in probe.windows]
    raw, activated = PoolingParams(use_activation=False), PoolingParams()
    found = encode(
        llm, probe.task, _in_turns(ids, ids), _in_turns(*([p] * len(ids) for p in (raw, activated)))
    )
    return rows_of(probe, found[::2]), rows_of(probe, found[1::2])


def _in_turns(*columns: Sequence[Any]) -> list[Any]:
    return [value for row in zip(*columns, strict=True) for value in row]


def encode(
    llm: LLM,
    task: Task,
    prompts: Iterable[Sequence[int]],
    params: PoolingParams | Sequence[PoolingParams],
) -> list[Rows]:
    """Return what vLLM gives for each prompt of token ids: [tokens, D], or [1, D] for a text."""
    from vllm.inputs import TokensPrompt

    found = llm.encode(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
        params,
        pooling_task=POOLING[task].task,
        use_tqdm=False,
    )
    return [np.atleast_2d(output.outputs.data.float().numpy()) for output in found]


def rows_of(probe: Probe, found: Sequence[Rows]) -> Rows:
    """Return the probe's rows [n, D] of what came back for its windows."""
    from quantgate.engine import EngineFailure

    for window, rows in zip(probe.windows, found, strict=True):
        expected = 1 if probe.task == SEQUENCE_REWARD else len(window.ids)
        if len(rows) != expected:
            raise EngineFailure(
                f"{window.document}: {len(window.ids)} tokens went in, {len(rows)} rows came back, "
                f"not {expected}."
            )
    return np.concatenate([rows[-w.scored :] for w, rows in zip(probe.windows, found, strict=True)])

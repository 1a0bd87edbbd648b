"""Pooling models in vLLM: how an engine is configured for a task, and what it returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, GENERATE, POOLING, SEQUENCE_REWARD, Task, task_of

if TYPE_CHECKING:
    from vllm import LLM, PoolingParams

    from quantgate.subject.probe import Probe

Rows = NDArray[np.float32]


def pooling_arguments(
    directory: Path, task: Task, *, step_tag_id: int | None = None
) -> dict[str, Any]:
    """Return the further arguments of `vllm.LLM` for a task; {} for text generation.

    With `step_tag_id` a token classifier returns only that token's rows (vLLM's STEP pooling),
    otherwise every row.
    """
    if task == GENERATE:
        return {}
    pooler: dict[str, Any] = {"task": POOLING[task].task}
    if task != SEQUENCE_REWARD:
        pooler["tok_pooling_type"] = "ALL" if step_tag_id is None else "STEP"
    if step_tag_id is not None:
        pooler["step_tag_id"] = step_tag_id
    # vLLM sets up pair scoring for embeddings and rewards, and that takes texts.
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "pooler_config": pooler,
        "skip_tokenizer_init": False,
    }
    if task == EMBED and task_of(read_config(directory)) == GENERATE:
        arguments["convert"] = "embed"
    return arguments


def outputs(llm: LLM, probe: Probe) -> tuple[Rows, Rows]:
    """Return raw and activated outputs [n, D] of a probe's rows.

    Requests of both kinds alternate in one batch, so that a parameter leaking from one request to
    the next shows in both.
    """
    from vllm import PoolingParams

    ids = [window.ids for window in probe.windows]
    raw, activated = PoolingParams(use_activation=False), PoolingParams()
    found = encode(
        llm, probe.task, _in_turns(ids, ids), _in_turns(*([p] * len(ids) for p in (raw, activated)))
    )
    return rows_of(probe, found[::2]), rows_of(probe, found[1::2])


def raw_outputs(llm: LLM, probe: Probe) -> Rows:
    """Return raw outputs [n, D] of a probe's rows."""
    from vllm import PoolingParams

    ids = [window.ids for window in probe.windows]
    return rows_of(probe, encode(llm, probe.task, ids, PoolingParams(use_activation=False)))


def late_interaction_scores(llm: LLM, probe: Probe) -> NDArray[np.float64]:
    """Return what `LLM.score` gives for a probe's queries and documents [queries, documents]."""
    texts = {
        kind: [window.text for window in probe.windows if window.stratum == kind]
        for kind in ("query", "document")
    }
    found = [llm.score(query, texts["document"], use_tqdm=False) for query in texts["query"]]
    return np.array([[output.outputs.score for output in row] for row in found])


@dataclass(frozen=True)
class Steps:
    """What an engine with STEP pooling gives: raw rows, for one request of each kind per window."""

    tagged: tuple[Rows, ...]
    """With the engine's own step tag [steps, D]."""
    first: tuple[Rows, ...]
    """With the window's first token as the request's own tag [>= 1, D]."""
    column: tuple[Rows, ...] | None
    """With `returned_token_ids=[1]` [steps, 1]; None if not supported: see `takes_columns`."""


def steps(llm: LLM, probe: Probe) -> Steps:
    """Serve every window with each kind of pooling parameters, all in one batch."""
    from vllm import PoolingParams

    kinds: list[dict[str, Any]] = [{}, {"first": True}]
    if takes_columns(llm):
        kinds.append({"returned_token_ids": [1]})
    prompts, params = [], []
    for window in probe.windows:
        for kind in kinds:
            own = {"step_tag_id": window.ids[0]} if "first" in kind else kind
            prompts.append(window.ids)
            params.append(PoolingParams(use_activation=False, **own))
    found = encode(llm, probe.task, prompts, params)
    by_kind = [tuple(found[start :: len(kinds)]) for start in range(len(kinds))]
    return Steps(by_kind[0], by_kind[1], by_kind[2] if len(kinds) > 2 else None)


def takes_columns(llm: LLM) -> bool:
    """Whether the engine's model supports `returned_token_ids`.

    For a converted token classifier, vLLM 0.32.0 selects those columns from the hidden state,
    before the head, and crashes; a reward model's head runs before the pooling.
    """
    architectures = llm.llm_engine.model_config.hf_config.architectures
    return any("RewardModel" in architecture for architecture in architectures)


def _in_turns(*columns: Sequence[Any]) -> list[Any]:
    return [value for row in zip(*columns, strict=True) for value in row]


def encode(
    llm: LLM,
    task: Task,
    prompts: Iterable[Sequence[int]],
    params: PoolingParams | Sequence[PoolingParams],
) -> list[Rows]:
    """Return vLLM's output for each prompt of token ids: [tokens, D], or [1, D] for a text."""
    from vllm.inputs import TokensPrompt

    found = llm.encode(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
        params,
        pooling_task=POOLING[task].task,
        use_tqdm=False,
    )
    return [np.atleast_2d(output.outputs.data.float().numpy()) for output in found]


def rows_of(probe: Probe, found: Sequence[Rows]) -> Rows:
    """Return the probe's rows [n, D] from the outputs for its windows."""
    from quantgate.measuring.engine_failure import EngineFailure

    for window, rows in zip(probe.windows, found, strict=True):
        expected = 1 if probe.task == SEQUENCE_REWARD else len(window.ids)
        if len(rows) != expected:
            raise EngineFailure(
                f"{window.document}: {len(window.ids)} tokens went in, {len(rows)} rows came back, "
                f"not {expected}."
            )
    return np.concatenate([rows[-w.scored :] for w, rows in zip(probe.windows, found, strict=True)])

"""Pooling models in vLLM: how an engine is told what a checkpoint does, and what it gives back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantgate.checkpoint import read_config
from quantgate.probe import Probe
from quantgate.task import EMBED, GENERATE, POOLING, SEQUENCE_REWARD, Task, task_of

if TYPE_CHECKING:
    from vllm import LLM, PoolingParams

Rows = NDArray[np.float32]

# How many windows are served alone and together, and how many tokens a chunk of a prompt has.
TOGETHER = 8
CHUNK = 32


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
    # vLLM's scoring of pairs, which it prepares for embeddings and rewards, takes texts.
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


def raw_outputs(llm: LLM, probe: Probe) -> Rows:
    """Return raw outputs [n, D] of a probe's rows."""
    from vllm import PoolingParams

    ids = [window.ids for window in probe.windows]
    return rows_of(probe, encode(llm, probe.task, ids, PoolingParams(use_activation=False)))


@dataclass(frozen=True)
class Batches:
    """The same few windows, served in two ways by one engine: raw rows [m, D], window by window."""

    windows: tuple[int, ...]
    """Indices into the probe's windows."""
    alone: Rows
    """Each by itself."""
    together: Rows
    """All in one batch, in another order."""
    scores: NDArray[np.float64] | None = None
    """What `LLM.score` gives for the queries and documents among them [queries, documents]."""
    chunkable: bool = True
    """Whether this engine's prompts can be cut into chunks: not those of a model that reads both
    ways."""


def batches(llm: LLM, probe: Probe) -> Batches:
    """Serve windows of the most different lengths alone and together."""
    from vllm import PoolingParams

    raw = PoolingParams(use_activation=False)
    windows = mixed_windows(probe)
    ids = [probe.windows[index].ids for index in windows]
    order = np.random.default_rng(0).permutation(len(windows))
    shuffled = encode(llm, probe.task, [ids[i] for i in order], raw)
    together = [shuffled[place] for place in np.argsort(order)]
    alone = [encode(llm, probe.task, [one], raw)[0] for one in ids]
    scores = None
    if probe.task == EMBED:
        queries, documents = (texts_of(probe, windows, kind) for kind in ("query", "document"))
        found = [llm.score(query, documents, use_tqdm=False) for query in queries]
        scores = np.array([[output.outputs.score for output in row] for row in found])
    chunkable = llm.llm_engine.model_config.is_chunked_prefill_supported
    return Batches(windows, np.concatenate(alone), np.concatenate(together), scores, chunkable)


def texts_of(probe: Probe, windows: Sequence[int], stratum: str) -> list[str]:
    """Return the texts of the windows that are of a stratum."""
    chosen = (probe.windows[index] for index in windows)
    return [window.text for window in chosen if window.stratum == stratum]


def mixed_windows(probe: Probe) -> tuple[int, ...]:
    """Return `TOGETHER` windows, of evenly spaced ranks by length, in the probe's order."""
    by_length = sorted(range(len(probe.windows)), key=lambda i: len(probe.windows[i].ids))
    ranks = np.linspace(0, len(by_length) - 1, min(TOGETHER, len(by_length))).astype(int)
    return tuple(sorted({by_length[rank] for rank in ranks}))


def chunking(*, chunked: bool) -> dict[str, Any]:
    """Return what `vllm.LLM` is given to cut prompts into chunks, or to leave them whole."""
    if chunked:
        return {"enable_chunked_prefill": True, "max_num_batched_tokens": CHUNK}
    return {"enable_chunked_prefill": False}


@dataclass(frozen=True)
class Steps:
    """What an engine with STEP pooling gives: raw rows of one request of each kind a window."""

    tagged: tuple[Rows, ...]
    """With the engine's own step tag [steps, D]."""
    first: tuple[Rows, ...]
    """With the window's first token as the request's own tag [>= 1, D]."""
    column: tuple[Rows, ...] | None
    """With `returned_token_ids=[1]` [steps, 1]; None where vLLM cannot: see `takes_columns`."""


def steps(llm: LLM, probe: Probe) -> Steps:
    """Serve every window with each kind of parameters, all in one batch."""
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
    """Whether the engine's model takes `returned_token_ids`.

    vLLM 0.32.0 takes those columns before a converted token classifier's head, of its hidden state,
    and crashes; a reward model's head comes before the pooling.
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

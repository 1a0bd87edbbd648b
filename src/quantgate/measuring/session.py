"""Queries of a running engine: scores, raw outputs, captures, and the kernels that serve it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantgate.formats import builds
from quantgate.measuring import engine, environment
from quantgate.measuring.capture import Capture, take_capture
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.environment import library_versions
from quantgate.measuring.measurement import Announce, Measurement, Provenance, pooled
from quantgate.measuring.pooling import outputs, pooling_arguments, raw_outputs
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.probe import Probe
from quantgate.subject.task import GENERATE
from quantgate.subject.windows import part_of, replay_windows

if TYPE_CHECKING:
    from vllm import LLM

Found = TypeVar("Found")


def measure(  # noqa: PLR0913  all but two are keyword-only, and independent
    directory: Path,
    probe: Probe,
    *,
    settings: EngineSettings,
    dtype: str,
    announce: Announce,
    capture_into: Path | None = None,
    audit_load: bool = False,
    meanwhile: Callable[[LLM], None] = lambda _: None,
) -> tuple[Measurement, Capture | None]:
    """Score `probe` with the checkpoint in `directory`, served by vLLM in `dtype`.

    `meanwhile` is called with the engine once it has scored, for further measurements. With
    `capture_into`, also write there what every linear saw of a few windows; for that, an engine
    that compiles or replays graphs is started a second time, eagerly. With `audit_load`, the first
    engine compares what it loads with the file.
    """
    pooling = pooling_arguments(directory, probe.task)

    def serve_it() -> tuple[Measurement, Capture | None]:
        with engine.running_engine(
            directory, settings=settings, dtype=dtype, audit_load=audit_load, **pooling
        ) as llm:
            announce(f"scoring {probe.scored} tokens in {len(probe.windows)} windows")
            measured = _measured(llm, probe, dtype)
            meanwhile(llm)
            if capture_into is None or not settings.enforce_eager:
                return measured, None
            announce("capturing inputs and outputs of every linear")
            return measured, capture(llm, probe, capture_into)

    # In a function of its own: a name for the first engine would keep its memory from the second.
    measured, captured = serve_it()
    if capture_into is None or captured is not None:
        return measured, captured
    announce("loading again, eagerly, to capture inputs and outputs")
    eager = replace(settings, enforce_eager=True)
    with engine.running_engine(directory, settings=eager, dtype=dtype, **pooling) as llm:
        return measured, capture(llm, probe, capture_into)


def _measured(llm: LLM, probe: Probe, dtype: str) -> Measurement:
    provenance = provenance_of(llm, dtype)
    if probe.task == GENERATE:
        return serve(llm, probe, provenance)
    require_length(llm, probe)
    raw, activated = outputs(llm, probe)
    return pooled(raw, provenance, activated)


def in_new_engine(
    checkpoint: Checkpoint,
    dtype: str,
    announce: Announce,
    serve_with: Callable[[LLM], Found],
    **more: Any,
) -> Found:
    """Return what `serve_with` gives with a new engine; `more` are arguments of the engine."""
    arguments = pooling_arguments(checkpoint.directory, checkpoint.task)
    with engine.running_engine(
        checkpoint.directory, settings=checkpoint.engine, dtype=dtype, **{**arguments, **more}
    ) as llm:
        announce("serving")
        return serve_with(llm)


def serve(llm: LLM, probe: Probe, provenance: Provenance) -> Measurement:
    """Return what an engine gives for a probe, all in one batch: scores, or raw outputs alone."""
    if probe.task == GENERATE:
        # float32 is judged token by token; the serving dtype is judged by its distributions.
        logprob, top1, hidden = score(llm, probe, hidden=provenance.dtype != "float32")
        return Measurement(logprob, top1, provenance, hidden)
    require_length(llm, probe)
    return pooled(raw_outputs(llm, probe), provenance)


def capture(llm: LLM, probe: Probe, directory: Path) -> Capture:
    """Serve the probe's replay windows one by one, and keep what every linear saw of them."""

    def serve_alone(window: int) -> NDArray[np.floating[Any]]:
        # Tokens read from the cache pass through no linear; vLLM 0.26 caches even whole texts.
        llm.reset_prefix_cache()
        alone = part_of(probe, [window])
        return score(llm, alone)[0] if probe.task == GENERATE else raw_outputs(llm, alone)

    return take_capture(llm, directory, replay_windows(probe), serve_alone)


def score(
    llm: LLM, probe: Probe, *, hidden: bool = False
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Return log-probabilities float32 [n] and most probable tokens int32 [n] of a probe.

    And, if requested, the head's input float32 [n, H].
    """
    require_length(llm, probe)
    found = _score(llm, [window.ids for window in probe.windows], hidden=hidden)
    columns: list[tuple[Any, ...]] = []
    for window, scores in zip(probe.windows, found, strict=True):
        if len(scores) != len(window.ids):
            raise EngineFailure(
                f"{window.document}: {len(window.ids)} tokens went in, scores for {len(scores)} "
                "came back."
            )
        rows = slice(window.score_from - 1, None)
        states = (scores.hidden_states[rows],) if hidden else ()
        columns.append((scores.logprobs[rows], scores.top1[rows], *states))
    whole = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return whole[0], whole[1], whole[2] if hidden else None


def require_length(llm: LLM, probe: Probe) -> None:
    """Raise `EngineFailure` if the engine does not accept the probe's longest window."""
    longest = max(len(window.ids) for window in probe.windows)
    limit = llm.llm_engine.model_config.max_model_len
    if longest > limit:
        raise EngineFailure(
            f"probe '{probe.name}' has a window of {longest} tokens, but the engine takes prompts "
            f"of at most max_model_len={limit}; raise [engine] max_model_len."
        )


def _score(llm: LLM, prompts: Sequence[Sequence[int]], *, hidden: bool = False) -> list[Any]:
    asked = [{"score_hidden_states": hidden}] * len(prompts)
    return [output.prompt_logprobs for output in generate_scores(llm, prompts, asked)]


def generate_scores(
    llm: LLM, prompts: Sequence[Sequence[int]], asked: Sequence[Mapping[str, Any]]
) -> list[Any]:
    """Return vLLM's output for each prompt of token ids, scored with the `asked` score-mode
    options."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    found: list[Any] = llm.generate(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts],
        [SamplingParams(score_mode=True, max_tokens=0, temperature=0.0, **own) for own in asked],
        use_tqdm=False,
    )
    return found


def kernel_fingerprint(llm: LLM) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the kernel that serves each kind of layer, and which kernels are emulations.

    Read from the loaded model: `{"self_attn.qkv_proj": "MacheteLinearKernel", …}`.
    """
    # Every tensor-parallel rank answers; they run the same kernels.
    modules: dict[str, list[str]] = llm.collective_rpc("quantgate_kernels")[0]
    kinds: dict[str, set[str]] = {}
    for name, kernels in modules.items():
        # "model.layers.3.self_attn.qkv_proj" and its counterparts in other layers are one kind.
        kind = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        kinds.setdefault(kind, set()).update(kernels)
    marked = sorted({kernel for kernels in kinds.values() for kernel in kernels})
    return {
        kind: " + ".join(sorted(kernel.removesuffix("*") for kernel in kernels))
        for kind, kernels in kinds.items()
    }, tuple(kernel.removesuffix("*") for kernel in marked if kernel.endswith("*"))


def provenance_of(llm: LLM, dtype: str) -> Provenance:
    """Return the provenance of a running engine's measurements."""
    kernels, emulated = kernel_fingerprint(llm)
    ((device, platform),) = environment.available_devices().items()
    return Provenance(
        "engine",
        device,
        platform,
        dtype,
        kernels,
        emulated,
        library_versions(),
        builds.arithmetic(),
        tuple(llm.collective_rpc("quantgate_repaired")[0]),
    )

"""The checks of how models that pool are served: activations, heads, steps, batches, scores.

Takes what a check needs from the sources and returns its verdict, as `fidelity` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantgate import metrics
from quantgate.budget import ACTIVATION_MAX, BATCHING_MAX, ROUNDING_FACTOR, fp32_max
from quantgate.checkpoint import Checkpoint, read_config
from quantgate.formats.stored import StoredTensors
from quantgate.measurement import Measurement
from quantgate.pooling import CHUNK
from quantgate.probe import Probe
from quantgate.sources import Sources
from quantgate.task import EMBED, HEADS, activation_of, head_tensors, label_names
from quantgate.verdict import Deviation, Verdict, not_run

Values = NDArray[np.floating[Any]]
Derive = Callable[[Values], Values]


# Activations -------------------------------------------------------------------------------------


def activation(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge what a request that asks for nothing gets: the config's function of the raw outputs."""
    engine = sources.engine(checkpoint, "float32")
    assert engine.activated is not None
    given = engine.activated.astype(np.float64)
    kind, expected = _activated(engine.values, checkpoint)
    # The raw outputs are another request's, and no activation moves more than its input.
    deviations = [
        _same(
            "output",
            given,
            expected,
            sources,
            checkpoint,
            lambda values: _activated(values, checkpoint)[1],
            BATCHING_MAX,
        )
    ]
    if kind == "softmax":
        off = _max(np.abs(given.sum(axis=1) - 1))
        deviations.append(Deviation("max |sum of probabilities - 1|", off, ACTIVATION_MAX, ""))
    elif kind == "unit norm":
        off = _max(np.abs(np.linalg.norm(given, axis=1) - 1))
        deviations.append(Deviation("max |norm - 1|", off, ACTIVATION_MAX, ""))
    return _verdict(
        deviations,
        f"the config says {kind}; so are the outputs",
        engine,
        wrong=(f"the config says {kind}, which the outputs are not of the raw ones"),
    )


def _activated(raw: Values, checkpoint: Checkpoint) -> tuple[str, Values]:
    from scipy.special import expit, softmax

    raw = raw.astype(np.float64)
    if checkpoint.task == EMBED:
        return "unit norm", raw / np.linalg.norm(raw, axis=1, keepdims=True)
    kind = activation_of(read_config(checkpoint.directory), raw.shape[1])
    functions: dict[str, Derive] = {
        "softmax": lambda x: softmax(x, axis=1),
        "sigmoid": expit,
        "none": lambda x: x,
    }
    return kind, functions[kind](raw)


# The head ----------------------------------------------------------------------------------------


def head(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge that head and label names are the base's, to the bit, and in full precision."""
    base = checkpoint.base_checkpoint
    assert base is not None
    engine = sources.engine(checkpoint, "float32")
    ours, theirs = (label_names(read_config(c.directory)) for c in (checkpoint, base))
    renamed = [f"label {i} is {a}, the base's is {b}" for i, (a, b) in _unlike(ours, theirs)]
    tensors = _head_differences(checkpoint, base)
    quantized = [
        f"vLLM computes {kind} by {kernel}"
        for kind, kernel in engine.provenance.kernels.items()
        if kind in HEADS and kernel != "UnquantizedLinearMethod"
    ]
    deviations = [
        Deviation("labels that are not the base's", len(renamed), 0, ""),
        Deviation("tensors of the head that are not the base's", len(tensors), 0, ""),
        Deviation("quantized linears in the head", len(quantized), 0, ""),
    ]
    right = "the head is the base's to the bit, in full precision, and so are its labels"
    evidence = [*renamed, *tensors, *quantized]
    return _verdict(deviations, right, engine, wrong="; ".join(evidence), evidence=evidence)


def _unlike(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[int, tuple[str, str]]]:
    longest = max(len(ours), len(theirs))
    padded = ([*names, *["absent"] * (longest - len(names))] for names in (ours, theirs))
    pairs = enumerate(zip(*padded, strict=True))
    return [(i, (a, b)) for i, (a, b) in pairs if a != b]


def _head_differences(checkpoint: Checkpoint, base: Checkpoint) -> list[str]:
    ours, theirs = StoredTensors(checkpoint.directory), StoredTensors(base.directory)
    found = []
    for name in sorted({*head_tensors(ours.names), *head_tensors(theirs.names)}):
        if name not in ours:
            found.append(f"{name} is missing")
        elif name not in theirs:
            found.append(f"{name} is not in the base")
        elif not ours.read(name).equal(theirs.read(name)):
            found.append(f"{name} is not the base's")
    return found


# Ways of serving ---------------------------------------------------------------------------------


def batching(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge that what a request gets depends on nothing else, with chunked prefill and without."""
    engine = sources.engine(checkpoint, "float32")
    probe = sources.probe_of(checkpoint)
    whole = sources.batches(checkpoint, chunked=False)
    rows = _rows_of(whole.windows, probe)

    def deviation(what: str, values: Values) -> Deviation:
        alone = whole.alone
        return _same(what, values, alone, sources, checkpoint, lambda v: v[rows], BATCHING_MAX)

    deviations = [
        deviation("shuffled in one batch", whole.together),
        deviation("with the whole probe", engine.values[rows]),
    ]
    right = f"{len(whole.windows)} windows give the same however they are served"
    if whole.chunkable:
        chunked = sources.batches(checkpoint, chunked=True)
        deviations += [
            deviation(f"in chunks of {CHUNK} tokens", chunked.alone),
            deviation("shuffled and in chunks", chunked.together),
        ]
    else:
        right += "; vLLM does not cut the prompts of this model into chunks"
    return _verdict(deviations, right, engine, wrong="what is served depends on what else is")


def step_rows(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge that STEP pooling gives the rows of the step tags, as each request asks."""
    probe = sources.probe_of(checkpoint)
    ids = np.concatenate([window.ids for window in probe.windows])
    first = np.repeat(
        [window.ids[0] for window in probe.windows], [len(window.ids) for window in probe.windows]
    )
    tagged = np.flatnonzero(ids == checkpoint.step_tag_id)
    if not len(tagged):
        return not_run(
            f"no token of probe '{probe.name}' is the step tag {checkpoint.step_tag_id}",
            "correct step_tag_id in its file, or give a probe that has steps",
        )
    engine = sources.engine(checkpoint, "float32")
    served = sources.steps(checkpoint)
    kinds: list[tuple[str, Sequence[Values], Derive]] = [
        ("the engine's tag", served.tagged, lambda v: v[tagged]),
        ("a request's own tag", served.first, lambda v: v[ids == first]),
    ]
    if served.column is not None:
        kinds.append(("returned_token_ids", served.column, lambda v: v[tagged, 1:2]))
    deviations = []
    for what, windows, derive in kinds:
        rows, expected = np.concatenate(windows), derive(engine.values)
        if rows.shape != expected.shape:
            missing = abs(len(rows) - len(expected))
            deviations.append(Deviation(f"{what}: rows too many or too few", missing, 0, ""))
            continue
        deviations.append(_same(what, rows, expected, sources, checkpoint, derive))
    right = f"{len(tagged)} step tags give their own rows, and no other token does"
    return _verdict(deviations, right, engine, wrong="steps are not the rows of their tags")


def late_interaction(sources: Sources, checkpoint: Checkpoint) -> Verdict:
    """Judge `LLM.score`: the max-sim of the engine's own unit vectors."""
    engine = sources.engine(checkpoint, "float32")
    probe = sources.probe_of(checkpoint)
    served = sources.batches(checkpoint, chunked=False)
    assert served.scores is not None

    def scores(values: Values) -> Values:
        return metrics.similarity(values, probe, served.windows)

    # A score adds up as many products of unit vectors as its query has tokens.
    longest = max(len(w.ids) for w in probe.windows if w.stratum == "query")
    limit = fp32_max(checkpoint.task) * longest
    expected = scores(engine.values)
    deviation = _same("score", served.scores, expected, sources, checkpoint, scores, limit)
    right = f"{expected.size} scores of LLM.score are the max-sim of the token embeddings"
    return _verdict([deviation], right, engine, wrong="LLM.score is not max-sim")


def _same(
    what: str,
    measured: Values,
    expected: Values,
    sources: Sources,
    checkpoint: Checkpoint,
    derive: Derive,
    limit: float | None = None,
) -> Deviation:
    """Return how far two ways of serving the same are apart, beside what that may be.

    Where inputs are quantized, a sum in another order flips codes, and flips cascade: there the
    mean may be `ROUNDING_FACTOR` times what float32 costs the reference, `derive`d likewise, if
    that is more.
    """
    delta = np.abs(measured.astype(np.float64) - expected)
    allowed = fp32_max(checkpoint.task) if limit is None else limit
    if not checkpoint.quantizes_activations:
        return Deviation(f"{what}: max |Δ|", _max(delta), allowed, "")
    exact, rounded = (
        derive(sources.reference(checkpoint, dtype).values) for dtype in ("float64", "float32")
    )
    floor = float(np.mean(np.abs(exact.astype(np.float64) - rounded)))
    allowed = max(allowed, floor * ROUNDING_FACTOR)
    return Deviation(f"{what}: mean |Δ|", float(np.mean(delta)), allowed, "")


def _rows_of(windows: Sequence[int], probe: Probe) -> NDArray[np.int64]:
    starts = np.cumsum([0, *(window.scored for window in probe.windows)])
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in windows])


# Verdicts ----------------------------------------------------------------------------------------


def _verdict(
    deviations: list[Deviation],
    right: str,
    engine: Measurement,
    *,
    wrong: str,
    evidence: Sequence[str] = (),
) -> Verdict:
    exceeded = [deviation for deviation in deviations if deviation.exceeded]
    # The one that is nearest to its limit, or furthest beyond, is what a table shows.
    deviations = sorted(deviations, key=_part_of_limit, reverse=True)
    return Verdict(
        "fail" if exceeded else "pass",
        wrong if exceeded else right,
        tuple(deviations),
        n=len(engine.values),
        kernels=engine.provenance.kernels,
        emulated=engine.provenance.emulated,
        evidence=tuple(f"found      {line}" for line in evidence),
    )


def _part_of_limit(deviation: Deviation) -> float:
    if np.isnan(deviation.measured):
        return float("inf")
    if deviation.allowed == 0:
        return float("inf") if deviation.measured else 0.0
    return deviation.measured / deviation.allowed


def _max(values: Values) -> float:
    return float(values.max())  # NaN wins, and exceeds every allowance

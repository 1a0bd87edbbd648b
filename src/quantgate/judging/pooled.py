"""The checks of how pooling models are served: activations, heads, steps, batches, scores.

Collects what a check needs from its case and returns its verdict, as `fidelity` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from quantgate.formats.stored import StoredTensors
from quantgate.judging import metrics
from quantgate.judging.budget import ACTIVATION_MAX, INVARIANCE_MAX, fp32_max
from quantgate.judging.evidence import profile_of
from quantgate.judging.invariance import Derive, Values, by_limits, largest, same
from quantgate.judging.verdict import Deviation, Verdict, not_run
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.files import read_config
from quantgate.subject.task import EMBED, HEADS, activation_of, head_tensors, label_names
from quantgate.subject.windows import mixed

if TYPE_CHECKING:
    from quantgate.measuring.case import Case

# Activations -------------------------------------------------------------------------------------


def activation(case: Case) -> Verdict:
    """Judge a request with default parameters: its result is the config's function of the raw
    outputs."""
    case = case.sharpest
    engine, checkpoint = case.engine, case.checkpoint
    assert engine.activated is not None
    given = engine.activated.astype(np.float64)
    kind, expected = _activated(engine.values, checkpoint)
    # The raw outputs come from a separate request, and no activation moves more than its input.
    deviations = [
        same(
            "output",
            (given, expected),
            case,
            derive=lambda values: _activated(values, checkpoint)[1],
            limit=INVARIANCE_MAX,
            raw=False,
        )
    ]
    if kind == "softmax":
        off = largest(np.abs(given.sum(axis=1) - 1))
        deviations.append(Deviation("max |sum of probabilities - 1|", off, ACTIVATION_MAX, ""))
    elif kind == "unit norm":
        off = largest(np.abs(np.linalg.norm(given, axis=1) - 1))
        deviations.append(Deviation("max |norm - 1|", off, ACTIVATION_MAX, ""))
    return by_limits(
        deviations,
        f"the outputs match {kind} of the raw outputs, as config.json says",
        engine,
        wrong=f"config.json says {kind}, but the outputs do not match {kind} of the raw outputs",
        profile=profile_of(
            dataclasses.replace(engine, values=given),
            dataclasses.replace(engine, values=expected),
            case.probe,
        ),
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


def head(case: Case) -> Verdict:
    """Judge that head and label names equal the base's bit for bit, in full precision."""
    checkpoint, base = case.checkpoint, case.checkpoint.base_checkpoint
    assert base is not None
    engine = case.sharpest.engine
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
    return by_limits(deviations, right, engine, wrong="; ".join(evidence), evidence=evidence)


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


def step_rows(case: Case) -> Verdict:
    """Judge that STEP pooling returns the rows of the step tags that each request asks for."""
    case = case.sharpest
    probe, checkpoint = case.probe, case.checkpoint
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
    engine, served = case.engine, case.steps
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
        deviations.append(same(what, (rows, expected), case, derive=derive))
    right = f"{len(tagged)} step tags give their own rows, and no other token does"
    return by_limits(deviations, right, engine, wrong="steps are not the rows of their tags")


def late_interaction(case: Case) -> Verdict:
    """Judge that `LLM.score` is the max-sim of the engine's own unit vectors."""
    case = case.sharpest
    engine = case.engine
    probe, rows = mixed(case.probe)

    def scores(values: Values) -> Values:
        return metrics.similarity(values[rows], probe)

    # A score sums one product of unit vectors per query token.
    longest = max(len(w.ids) for w in probe.windows if w.stratum == "query")
    limit = fp32_max(case.checkpoint.task) * longest
    served, expected = case.late_interaction, scores(engine.values)
    deviation = same(
        "score",
        (served, expected),
        case,
        derive=scores,
        limit=limit,
        raw=False,
    )
    right = f"{expected.size} scores of LLM.score are the max-sim of the token embeddings"
    return by_limits([deviation], right, engine, wrong="LLM.score is not max-sim")

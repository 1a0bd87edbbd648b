"""Fidelity: does the engine compute what the checkpoint's weights define? If not, why?

Collects what a check needs from its case and passes it to the comparison.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from quantgate.formats.library_weights import largest_disagreement
from quantgate.judging import compare, distributions, modules
from quantgate.judging.attribution import Suspects, attribute
from quantgate.judging.routing import routing_of
from quantgate.measuring.measurement import mean_absolute_difference
from quantgate.measuring.precision import FLOAT32
from quantgate.measuring.replay import distance
from quantgate.measuring.whole_model import difference_from_whole

if TYPE_CHECKING:
    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.case import Case
    from quantgate.measuring.replay import Replay


def free_running(case: Case) -> Verdict:
    """Judge the scores of a free-running engine, by the rule for its dtype."""
    return attribute(compared(case), _suspects(case))


def replay(case: Case) -> Verdict:
    """Judge every linear on the engine's own inputs."""
    found = case.replay
    verdict = modules.replayed(
        case.engine,
        found,
        case.probe,
        rounding=lambda: distance(found, case.replay_in("float64")),
    )
    if found.choices:  # a dense model needs no free-running reference here
        verdict = _with_routing(case, found, verdict)
    return attribute(verdict, _suspects(case))


def _with_routing(case: Case, found: Replay, verdict: Verdict) -> Verdict:
    base = case.base
    routed = routing_of(found, case.probe, case.exact, None if base is None else base.exact)
    return dataclasses.replace(
        verdict,
        detail=verdict.detail + routed.sentence,
        evidence=(*verdict.evidence, *routed.lines),
    )


def divergence(case: Case) -> Verdict:
    """Judge whole distributions in the serving dtype against the float32 reference's."""
    exact, probe = case.exact, case.probe
    found, moved = (case.divergence(exact, one, probe) for one in (case.engine, case.rounded()))
    return distributions.divergence_from_reference(case.engine, exact, found, moved, probe)


def long_contexts(case: Case) -> Verdict:
    """Judge a free-running engine in the serving dtype on the probe's long contexts."""
    probe = case.lab.long_contexts_of(case.checkpoint)
    assert probe is not None  # the check needs them
    own = case.on(probe)
    engine = own.set_otherwise(case.checkpoint.engine, probe)
    return compare.fidelity_serving(engine, own.exact, own.rounded(), probe, base_noise=None)


def compared(case: Case) -> Verdict:
    """Compare a free-running engine with its reference; a fail is not yet attributed."""
    if case.dtype != FLOAT32:
        return _in_16_bits(case)
    if case.by_value:
        return compare.fidelity_fp32(
            case.engine, case.exact, case.probe, exact=lambda: case.reference("float64")
        )
    return compare.fidelity_chaotic(case.engine, case.exact, case.rounded(), case.probe)


def _in_16_bits(case: Case) -> Verdict:
    base_noise = None
    if (base := case.base) is not None:
        base_noise = mean_absolute_difference(base.engine, base.exact)
    return compare.fidelity_serving(
        case.engine, case.exact, case.rounded(), case.probe, base_noise=base_noise
    )


def _suspects(case: Case) -> Suspects:
    base = case.base
    return Suspects(
        engine=case.engine,
        own=case.exact,
        library=lambda: case.reference(FLOAT32, "library"),
        disagreement=lambda: largest_disagreement(case.checkpoint.directory),
        base=None if base is None else lambda: compared(base),
        modules=lambda: modules.modules_beyond(case.engine, case.replay),
        whole=lambda: difference_from_whole(case.checkpoint.directory, case.probe),
    )

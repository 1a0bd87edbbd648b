"""Approving goldens: proposing changes, refusing some, writing the rest: `quantgate approve`.

A golden is replaced only if the check that reads it would not pass: a run within tolerance rewrites
nothing.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantgate.atomic import write_atomically
from quantgate.judging import drift, fidelity, noise
from quantgate.judging.golden import (
    Golden,
    as_stored,
    figures_of,
    from_json,
    golden_key,
    golden_path,
    stored_dtype,
    to_json,
)
from quantgate.subject.files import digests

if TYPE_CHECKING:
    from quantgate.judging.verdict import Verdict
    from quantgate.measuring.case import Case
    from quantgate.subject.probe import Probe


@dataclass(frozen=True)
class Proposal:
    """One golden, current and proposed."""

    path: Path
    probe: Probe
    old: Golden | None
    new: Golden
    compared: Verdict | None
    """`drift`'s verdict on the new values against the old; None without comparable ones."""
    refusals: tuple[str, ...]
    """Why it must not be written."""

    @property
    def within_tolerance(self) -> bool:
        """Whether the stored golden still holds, so that nothing needs writing."""
        same_key = self.old is not None and self.old.key == self.new.key
        return same_key and self.compared is not None and self.compared.outcome == "pass"

    def lines(self) -> Iterator[str]:
        """Yield the lines for a reviewer: old → new for every figure, with the statistic."""
        before = figures_of(self.old.measurement, self.probe) if self.old else {}
        for name, value in figures_of(self.new.measurement, self.probe).items():
            yield f"{name} {before[name]:.9g} → {value:.9g}" if before else f"{name} {value:.9g}"
        if self.old is not None:
            theirs, ours = vars(self.old.key), vars(self.new.key)
            for field in (field for field in ours if theirs[field] != ours[field]):
                yield f"{field} {theirs[field]:.12} → {ours[field]:.12}"
        if self.compared is not None:
            yield from map(str, self.compared.deviations)
        yield from (f"refused: {refusal}" for refusal in self.refusals)


def propose(case: Case, reason: str, *, accept_failing: bool) -> Proposal:
    """Measure a checkpoint and compare it with its golden.

    Raises `BadInput` if the stored golden is damaged: its old values must be known.
    """
    checkpoint, probe, measured = case.checkpoint, case.probe, case.engine
    dtype = stored_dtype(case.dtype)
    path = golden_path(
        checkpoint.root, checkpoint.id, f"drift-{dtype}", measured.provenance.platform
    )
    old = _stored(path, probe)
    kept = as_stored(measured)
    served = fidelity.free_running(case)
    entry: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        **figures_of(kept, probe),
        "reason": reason,
        "versions": dict(measured.provenance.versions),
    }
    if old is not None:
        entry["before"] = figures_of(old.measurement, probe)
    refusals = list(_unlike(old, measured.provenance.emulated, probe))
    if measured.nonfinite:
        refusals.append(f"{measured.nonfinite} values are not finite")
    elif served.outcome != "pass":
        if accept_failing:
            entry["accepted_failing"] = f"fidelity-{dtype} {served.outcome}: {served.detail}"
        else:
            refusals.append(
                f"fidelity-{dtype} is {served.outcome} ({served.detail}), so this may be a fault; "
                "--accept-failing records that it is approved all the same"
            )
    new = Golden(
        golden_key(checkpoint, probe, measured),
        kept,
        (*(old.history if old else ()), entry),
        digests(checkpoint.directory),
    )
    compared = None
    if old is not None and old.key.probe == probe.sha256:
        compared = drift.against(case, kept, old.measurement)
    return Proposal(path, probe, old, new, compared, tuple(refusals))


def write(case: Case, proposal: Proposal) -> list[Path]:
    """Write what a proposal changes, each file atomically; return the paths written.

    The noise floor is written first, so that even after an interruption every golden has a floor.
    """
    if proposal.refusals:
        return []
    written = []
    path = noise.noise_path(case.checkpoint, case.dtype, proposal.new.key.platform)
    anew = not proposal.within_tolerance
    find = noise.measured_once if anew else noise.floor_of
    text = noise.to_json(find(case))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
        written.append(path)
    if anew:
        write_atomically(proposal.path, to_json(proposal.new, proposal.probe))
        written.append(proposal.path)
    return written


def _stored(path: Path, probe: Probe) -> Golden | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return from_json(text, probe, path)


def _unlike(old: Golden | None, emulated: tuple[str, ...], probe: Probe) -> Iterator[str]:
    """Yield reasons why a measurement cannot replace a golden: it measures something else."""
    if old is None:
        return
    remove = "if that is meant, remove the golden (git rm) and take a new one"
    if old.key.probe != probe.sha256:
        yield (f"the golden is of probe {old.key.probe:.12}, this is {probe.sha256:.12}; {remove}")
    if emulated and not old.measurement.provenance.emulated:
        yield (
            f"the golden is of native kernels, this of emulated ones ({', '.join(emulated)}), "
            f"which say nothing of them; {remove}"
        )

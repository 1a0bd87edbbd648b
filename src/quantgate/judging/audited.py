"""The audit as checks: is anything wrong with a checkpoint's files? Runs before any engine."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.judging.verdict import Deviation, Verdict

if TYPE_CHECKING:
    from quantgate.audit.finding import Finding
    from quantgate.subject.checkpoint import Checkpoint

# How many findings a failure lists.
SHOWN = 5


def files(checkpoint: Checkpoint) -> Verdict:
    """Judge headers, scales, config and tokenizer, also against the base's, if one is named."""
    from quantgate.audit.rules import RULES, audit  # load the rules on first use

    found = audit(checkpoint.directory, _base_of(checkpoint))
    asked = sum(rule.needs != "weights" for rule in RULES)
    said = f"{asked} rules find nothing wrong with its files"
    return _verdict(checkpoint, found, said)


def weights(checkpoint: Checkpoint) -> Verdict:
    """Judge every weight against the base's: is it a quantization of that weight?"""
    from quantgate.audit.rules import audit_weights

    found = audit_weights(checkpoint.directory, _base_of(checkpoint))
    said = "every weight is the base's, as far as its format can hold it"
    return _verdict(checkpoint, found, said)


def _verdict(checkpoint: Checkpoint, found: Sequence[Finding], right: str) -> Verdict:
    errors = [finding for finding in found if finding.severity == "error"]
    warnings = sum(finding.severity == "warning" for finding in found)
    others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    base = "" if checkpoint.base is None else f" --base {shlex.quote(checkpoint.base)} --deep"
    return Verdict(
        "fail" if errors else "pass",
        f"{errors[0]}{others}" if errors else right + (f"; {warnings} warnings" * bool(warnings)),
        (Deviation("errors in its files", len(errors), 0, ""),),
        findings=tuple(found),
        evidence=tuple(f"rule       {one.rule}: {one}" for one in errors[:SHOWN]),
        attribution="CHECKPOINT: its files say so, whatever serves them" if errors else "",
        next_step=f"python -m quantgate audit {shlex.quote(checkpoint.source)}{base}; "
        f"--explain {errors[0].rule} tells why it matters"
        if errors
        else "",
    )


def _base_of(checkpoint: Checkpoint) -> Path | None:
    base = checkpoint.base_checkpoint
    return None if base is None else base.directory

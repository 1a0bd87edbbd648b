"""The audit as checks: of a checkpoint's files, before any engine, and of what vLLM has loaded."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantgate.judging.verdict import Deviation, Verdict, not_run
from quantgate.patches.scoremode.hooks import vllm_version

if TYPE_CHECKING:
    from quantgate.audit.finding import Finding
    from quantgate.measuring.case import Case
    from quantgate.measuring.loaded import LoadAudit, LoadProblem
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


def loaded(case: Case) -> Verdict:
    """Judge what vLLM has loaded, on every rank: is each parameter what the file holds?"""
    ranks: list[LoadAudit] = []
    served = case.served.engine.provenance
    for audit in case.loaded:
        if audit is None:
            return not_run(f"vLLM {vllm_version()}'s loading cannot be watched", _READ_THE_LOG)
        if audit.failed:
            return not_run(f"the loaded model could not be compared ({audit.failed})", _REPORT)
        ranks.append(audit)
    problems = [_on_rank(p, n, len(ranks)) for n, one in enumerate(ranks) for p in one.problems]
    compared = max(one.compared for one in ranks)
    if not compared:
        kinds = ", ".join(ranks[0].not_compared[:SHOWN])
        return not_run(f"no parameter has a tensor of its name in the file: {kinds}", _REPORT)
    others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    left_out = sorted({kind for one in ranks for kind in one.not_compared})
    said = f"{compared} tensors of the file are what vLLM has loaded" + (
        f"; not compared: {', '.join(left_out[:SHOWN])}" if left_out else ""
    )
    return Verdict(
        "fail" if problems else "pass",
        f"{problems[0]}{others}" if problems else said,
        (Deviation("tensors that are not what the file holds", len(problems), 0, ""),),
        evidence=tuple(f"loaded     {problem}" for problem in problems[:SHOWN]),
        attribution=_at_fault(problems),
        next_step=_after_loading(case.checkpoint, problems),
        kernels=served.kernels,
        emulated=served.emulated,
    )


_READ_THE_LOG = "read the warning that vLLM logs, and install a version of docs/score-mode.md"
_REPORT = "report the model's architecture"


def _on_rank(problem: LoadProblem, rank: int, ranks: int) -> LoadProblem:
    where = f" on rank {rank}" if ranks > 1 else ""
    return dataclasses.replace(problem, value=f"{problem.value}{where}")


def _at_fault(problems: Sequence[LoadProblem]) -> str:
    if not problems:
        return ""
    if all(not problem.in_file for problem in problems):
        return "CHECKPOINT: its files lack what its config asks for"
    return "ENGINE: vLLM has not loaded what the file holds"


def _after_loading(checkpoint: Checkpoint, problems: Sequence[LoadProblem]) -> str:
    if not problems:
        return ""
    if any(not problem.in_file for problem in problems):
        return f"export {shlex.quote(checkpoint.source)} again, with every tensor"
    return f"compare with another vLLM than {vllm_version()}, and report it with the tensor's name"


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
        next_step=f"quantgate audit {shlex.quote(checkpoint.source)}{base}; "
        f"--explain {errors[0].rule} tells why it matters"
        if errors
        else "",
    )


def _base_of(checkpoint: Checkpoint) -> Path | None:
    base = checkpoint.base_checkpoint
    return None if base is None else base.directory

"""What has changed in a checkpoint's files since a golden was approved, and what to do about it.

A changed tokenizer or config moves scores as a new quantization does. Only the latter may be
approved without a look at the files.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantgate.subject.files import digests

if TYPE_CHECKING:
    from quantgate.subject.checkpoint import Checkpoint

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Change:
    """What is known of a change of files."""

    detail: str
    """Names the files, or what the audit says of them; "" if neither is known."""
    next_step: str


def change_since(checkpoint: Checkpoint, approved: Mapping[str, str], approve: str) -> Change:
    """Return how a checkpoint's files differ from approved ones, and the next step.

    `approved` holds each file's sha256 by name, or nothing: older goldens do not record them.
    `approve` is the step that approves the change, or "" if nothing explains it; it is offered only
    where nothing speaks against it.
    """
    from quantgate.audit.rules import audit

    now, base = digests(checkpoint.directory), checkpoint.base_checkpoint
    every = sorted(now.keys() | approved.keys()) if approved else []
    names = [name for name in every if now.get(name) != approved.get(name)]
    # Weights are compared where they have changed, or may have.
    deep = base is not None and (not names or any(name.endswith(WEIGHTS) for name in names))
    found = audit(checkpoint.directory, None if base is None else base.directory, deep=deep)
    wrong = next((str(finding) for finding in found if finding.severity == "error"), "")
    said = [f"changed: {', '.join(names)}"] if names else []
    said += [f"the audit says of it: {wrong}"] if wrong else []
    beside = f" --base {shlex.quote(checkpoint.base)}" if checkpoint.base else " --base BASE"
    command = f"quantgate audit {shlex.quote(checkpoint.source)}{beside}"
    is_known = bool(names) or base is not None
    other = any(not name.endswith(WEIGHTS) for name in names)
    if wrong or other or not is_known or not approve:
        step = f"approve only a change that {command} explains"
    else:
        step = approve if names else f"{command} finds nothing wrong with its files; {approve}"
    return Change("; ".join(said), step)

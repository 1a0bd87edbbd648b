"""`quantgate approve`: take checkpoints' goldens anew; nothing else writes them.

Old → new is shown for every golden before it is written, atomically. Goldens within tolerance are
not rewritten.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantgate.commands import companions
from quantgate.errors import BadInput
from quantgate.judging import approval, noise
from quantgate.judging.golden import DTYPES, unclaimed
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.precision import why_no_float32
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import (
    read_all_checkpoint_files,
    read_checkpoint_files,
    verify,
)
from quantgate.subject.probe import stored_probe


@dataclass(frozen=True)
class Approval:
    """What a person asks for."""

    reason: str
    """Kept in the goldens' history."""
    dry_run: bool = False
    """Show what would change, and write nothing."""
    accept_failing: bool = False
    """Approve what fails fidelity, too; the golden's history says so."""


def run(project: Path, names: Sequence[str] | None, asked: Approval) -> int:
    """Approve the named checkpoints of a project, or all that have goldens.

    Returns 0 if all goldens are up to date and 1 if one was refused. Raises `BadInput` for user
    errors, and `EngineFailure`.
    """
    refused = []
    chosen = selected(project, names, asked.reason)
    companions.require()
    for checkpoint in chosen:
        verify(checkpoint)
        # One at a time: a checkpoint's measurements are of no use for the next.
        lab = Lab(
            stored_probe,
            Ledger(
                lambda text: print(f"  {text}", file=sys.stderr),
                DiskCache(project / ".gate-cache"),
            ),
            served_again=noise.served_again,
        )
        refused += regenerate(checkpoint, lab, asked)
    if refused:
        print(f"refused: {len(refused)}; nothing of these was written.")
    return 1 if refused else 0


def selected(project: Path, names: Sequence[str] | None, reason: str) -> list[Checkpoint]:
    """Return the checkpoints whose goldens to regenerate; raise `BadInput` for user errors."""
    if os.environ.get("CI") or os.environ.get("PYTEST_XDIST_WORKER"):
        raise BadInput(
            "CI or an xdist worker takes no golden: a person looks at it and commits it; run this "
            "on the machine it is for."
        )
    if not reason.strip():
        raise BadInput("--reason is empty; say why the golden changes.")
    known = read_all_checkpoint_files(project)
    if orphans := unclaimed(project, known):
        raise BadInput(
            f"{orphans[0].relative_to(project)}: no checkpoint file claims it"
            + (f", nor {len(orphans) - 1} others" if len(orphans) > 1 else "")
            + "; remove it (git rm), or add the file."
        )
    if not known:
        raise BadInput(
            f"{project / 'fixtures' / 'checkpoints'}: no checkpoint file there, and only a "
            "checkpoint with a file has goldens; `quantgate init` writes an example of one."
        )
    plain = read_checkpoint_files(project)  # without those in collections
    wanted = names or [name for name, one in plain.items() if one.golden]
    for name in wanted:
        if name not in known:
            raise BadInput(
                f"--checkpoint {name}: not an id in fixtures/checkpoints ({', '.join(known)}); "
                "only those have goldens."
            )
        if not known[name].golden:
            raise BadInput(f"--checkpoint {name}: its file says golden = false.")
    return [known[name] for name in dict.fromkeys(wanted)]


def regenerate(checkpoint: Checkpoint, lab: Lab, asked: Approval) -> list[approval.Proposal]:
    """Show the changes to a checkpoint's goldens, write them, and return the refused ones."""
    refused = []
    for dtype in DTYPES[1:] if why_no_float32(checkpoint) else DTYPES:
        case = Case.of(checkpoint, dtype, lab)
        proposal = approval.propose(case, asked.reason.strip(), accept_failing=asked.accept_failing)
        path = proposal.path.relative_to(checkpoint.root)
        if proposal.refusals:
            refused.append(proposal)
        if proposal.within_tolerance and not proposal.refusals:
            print(f"{path}: within tolerance, kept")
        else:
            print(f"{path}: {'new' if proposal.old is None else 'changed'}")
            print("".join(f"  {line}\n" for line in proposal.lines()), end="", flush=True)
        if asked.dry_run:
            continue
        for written in approval.write(case, proposal):
            print(f"  wrote {written.relative_to(checkpoint.root)}", flush=True)
    return refused

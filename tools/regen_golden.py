"""Regenerate checkpoints' goldens; nothing else writes them.

    python tools/regen_golden.py --checkpoint tiny-llama-w4a16 --reason "first release"
    python tools/regen_golden.py --all --reason "vLLM 0.33" --dry-run

Shows old → new for every golden before it is written, atomically. Goldens within tolerance are not
rewritten. Exit status: 0 if all goldens are up to date, 1 if one was refused, 2 for bad input.
"""

import argparse
import os
import sys
from pathlib import Path

from quantgate.errors import BadInput
from quantgate.judging import approval, noise
from quantgate.judging.golden import DTYPES, unclaimed
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.precision import has_float32
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files, verify
from quantgate.subject.probe import stored_probe

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Take checkpoints' goldens anew.")
    selection = parser.add_mutually_exclusive_group(required=True)
    selection.add_argument("--checkpoint", action="append", metavar="ID", help="may be repeated")
    selection.add_argument("--all", action="store_true", help="every checkpoint that has goldens")
    parser.add_argument("--reason", required=True, help="kept in the golden's history")
    parser.add_argument("--dry-run", action="store_true", help="show what would change, write none")
    parser.add_argument(
        "--accept-failing",
        action="store_true",
        help="approve what fails fidelity too; the golden's history says so",
    )
    return parser.parse_args()


def selected(arguments: argparse.Namespace) -> list[Checkpoint]:
    """Return the checkpoints whose goldens to regenerate; raise `BadInput` for user errors."""
    if os.environ.get("CI") or os.environ.get("PYTEST_XDIST_WORKER"):
        raise BadInput(
            "CI or an xdist worker takes no golden: a person looks at it and commits it; run this "
            "on the machine it is for."
        )
    if not arguments.reason.strip():
        raise BadInput("--reason is empty; say why the golden changes.")
    known = read_checkpoint_files(ROOT)
    if orphans := unclaimed(ROOT, known):
        raise BadInput(
            f"{orphans[0].relative_to(ROOT)}: no checkpoint file claims it"
            + (f", nor {len(orphans) - 1} others" if len(orphans) > 1 else "")
            + "; remove it (git rm), or add the file."
        )
    names = arguments.checkpoint or [name for name, one in known.items() if one.golden]
    for name in names:
        if name not in known:
            raise BadInput(
                f"--checkpoint {name}: not an id in fixtures/checkpoints ({', '.join(known)}); "
                "only those have goldens."
            )
        if not known[name].golden:
            raise BadInput(f"--checkpoint {name}: its file says golden = false.")
    return [known[name] for name in dict.fromkeys(names)]


def regenerate(
    checkpoint: Checkpoint, lab: Lab, arguments: argparse.Namespace
) -> list[approval.Proposal]:
    """Show the changes to a checkpoint's goldens, write them, and return the refused ones."""
    refused = []
    for dtype in DTYPES if has_float32(checkpoint) else DTYPES[1:]:
        case = Case.of(checkpoint, dtype, lab)
        proposal = approval.propose(
            case, arguments.reason.strip(), accept_failing=arguments.accept_failing
        )
        path = proposal.path.relative_to(ROOT)
        if proposal.refusals:
            refused.append(proposal)
        if proposal.within_tolerance and not proposal.refusals:
            print(f"{path}: within tolerance, kept")
        else:
            print(f"{path}: {'new' if proposal.old is None else 'changed'}")
            print("".join(f"  {line}\n" for line in proposal.lines()), end="", flush=True)
        if arguments.dry_run:
            continue
        for written in approval.write(case, proposal):
            print(f"  wrote {written.relative_to(ROOT)}", flush=True)
    return refused


def main() -> int:
    """Command-line entry point; returns 1 if a golden was refused, 2 on a user error."""
    arguments = parse_arguments()
    refused = []
    try:
        for checkpoint in selected(arguments):
            verify(checkpoint)
            # One at a time: a checkpoint's measurements are of no use for the next.
            lab = Lab(
                stored_probe,
                Ledger(
                    lambda text: print(f"  {text}", file=sys.stderr),
                    DiskCache(ROOT / ".gate-cache"),
                ),
                served_again=noise.served_again,
            )
            refused += regenerate(checkpoint, lab, arguments)
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if refused:
        print(f"refused: {len(refused)}; nothing of these was written.")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

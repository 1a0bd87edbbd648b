"""Take a checkpoint's goldens anew: the only way to write one.

    python tools/regen_golden.py --checkpoint tiny-llama-w4a16 --reason "first release"

Shows old → new for every golden before it is written. Each file is replaced in one step.
"""

import argparse
import datetime
import sys
from pathlib import Path

from quantgate.atomic import write_atomically
from quantgate.checkpoint import BadInput, Checkpoint, read_checkpoint_files, verify
from quantgate.compare import largest_difference
from quantgate.engine import EngineFailure
from quantgate.golden import (
    Golden,
    as_stored,
    figures_of,
    from_json,
    golden_key,
    golden_path,
    to_json,
)
from quantgate.probe import Probe, embedded_probe
from quantgate.sources import Sources
from quantgate.task import quantity_of

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", "serving")


def previous(path: Path, probe: Probe) -> Golden | None:
    """Return the stored golden; None where there is none or it cannot be read."""
    try:
        return from_json(path.read_text(encoding="utf-8"), probe, path)
    except FileNotFoundError:
        return None
    except BadInput as error:
        print(f"  {error}", file=sys.stderr)
        return None


def describe(old: Golden | None, new: Golden, probe: Probe) -> str:
    """Return one line: old → new."""
    after = figures_of(new.measurement, probe)
    if old is None:
        return "none → " + ", ".join(f"{name} {value:.9g}" for name, value in after.items())
    changed = [
        field for field in vars(new.key) if getattr(old.key, field) != getattr(new.key, field)
    ]
    before = figures_of(old.measurement, probe)
    line = ", ".join(f"{name} {before[name]:.9g} → {value:.9g}" for name, value in after.items())
    if old.key.probe == new.key.probe:
        largest = largest_difference(new.measurement, old.measurement)
        line += f", max |Δ {quantity_of(probe.task)}| {largest:.3g}"
    return line + (f"; another {', '.join(changed)}" if changed else "")


def regenerate(checkpoint: Checkpoint, sources: Sources, reason: str) -> None:
    """Measure a checkpoint and replace its goldens for this platform."""
    probe = sources.probe_of(checkpoint)
    for dtype in DTYPES:
        measured = sources.engine(checkpoint, dtype)
        if measured.nonfinite:
            raise BadInput(
                f"{checkpoint.id}: {measured.nonfinite} values in {dtype} are not finite; no "
                "golden is made of that."
            )
        kept = as_stored(measured)
        check = f"drift-{dtype}"
        path = golden_path(ROOT, checkpoint.id, check, measured.provenance.platform)
        old = previous(path, probe)
        entry = {
            "date": datetime.date.today().isoformat(),
            **figures_of(kept, probe),
            "reason": reason,
            "versions": dict(measured.provenance.versions),
        }
        new = Golden(
            golden_key(checkpoint, probe, measured),
            kept,
            ((*old.history, entry) if old else (entry,)),
        )
        print(f"{path.relative_to(ROOT)}: {describe(old, new, probe)}")
        write_atomically(path, to_json(new, probe))


def main() -> int:
    """Parse the command line; errors of the user are one sentence."""
    parser = argparse.ArgumentParser(description="Take a checkpoint's goldens anew.")
    parser.add_argument("--checkpoint", action="append", required=True, metavar="ID")
    parser.add_argument("--reason", required=True, help="kept in the golden's history")
    arguments = parser.parse_args()
    try:
        if not arguments.reason.strip():
            raise BadInput("--reason is empty; say why the golden changes.")
        known = read_checkpoint_files(ROOT)
        sources = Sources(
            lambda task, quality: embedded_probe(ROOT, task, quality=quality),
            lambda text: print(f"  {text}", file=sys.stderr),
        )
        unknown = sorted(set(arguments.checkpoint) - set(known))
        if unknown:
            raise BadInput(
                f"--checkpoint {unknown[0]}: not an id in fixtures/checkpoints "
                f"({', '.join(known)}); only those have goldens."
            )
        for name in dict.fromkeys(arguments.checkpoint):
            verify(known[name])
            regenerate(known[name], sources, arguments.reason.strip())
    except (BadInput, EngineFailure) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

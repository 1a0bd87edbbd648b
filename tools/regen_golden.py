"""Take a checkpoint's goldens anew: the only way to write one.

    python tools/regen_golden.py --checkpoint tiny-llama-w4a16 --reason "first release"

Shows old → new for every golden before it is written. Each file is replaced in one step.
"""

import argparse
import datetime
import sys
from pathlib import Path

import numpy as np

from quantgate import noise
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


def keep_noise(checkpoint: Checkpoint, sources: Sources, dtype: str, *, anew: bool) -> None:
    """Write the noise floor beside a golden: with a new golden, or where there is none for it."""
    platform = sources.engine(checkpoint, dtype).provenance.platform
    path = noise.noise_path(checkpoint, dtype, platform)
    find = noise.measured_once if anew else noise.floor_of
    floor = find(sources, checkpoint, dtype)
    text = noise.to_json(floor)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        worst = floor.of("max_abs")
        print(f"{path.relative_to(ROOT)}: {len(floor.reruns)} reruns, max |Δ| {worst:.3g}")
        write_atomically(path, text)


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
        unchanged = (
            old is not None
            and old.key == new.key
            and np.array_equal(old.measurement.values, kept.values)
        )
        line = "unchanged" if unchanged else describe(old, new, probe)
        print(f"{path.relative_to(ROOT)}: {line}")
        if not unchanged:
            write_atomically(path, to_json(new, probe))
        keep_noise(checkpoint, sources, dtype, anew=not unchanged)


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

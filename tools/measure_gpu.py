"""Measure what needs a GPU, and write the figures as JSON: what `make gpu` runs.

    python tools/measure_gpu.py --out build/gpu
    python tools/measure_gpu.py --out build/gpu --part formats --only "w4a16 float16"
    python tools/measure_gpu.py --part goldens --part gate --minutes 13
    python tools/measure_gpu.py --list

Each part is a list of items. Worker processes measure them and write each at once, so what a GPU
does to one of them takes nothing from the others: an item that fails, ends its process or hangs
is "not run", with the reason, and a new process goes on with the next one. Items that are no
timings are measured side by side: a small engine leaves most of a GPU idle. What tells most comes
first, and `--minutes` ends a run on a machine that is lent for so long. Another run measures what
was not measured yet with the same code, versions and device. Exits 0 where all of it was,
1 where something was not run, 2 for bad input.
"""

import argparse
import datetime
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu.journal import Journal
from gpu.parts import PARTS, ROOT, Checkpoints, side_by_side
from gpu.tables import markdown
from gpu.workers import Limits, share_of, supervise, work
from quantgate.atomic import write_atomically
from quantgate.commands.doctor import device_name
from quantgate.errors import BadInput
from quantgate.measuring.cache import code_version
from quantgate.measuring.environment import available_devices, library_versions
from quantgate.subject.checkpoint_file import read_checkpoint_files

# With other code in tools/ figures are measured again, but for what only keeps and shows them.
MEASURING = ("bench_score.py", "bench_head.py", "gpu/*.py")
NOT_MEASURING = ("journal.py", "tables.py", "workers.py")
TERMINATED = 128 + signal.SIGTERM


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure what needs a GPU.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="for gpu.json, gpu.md")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated")
    parser.add_argument("--checkpoint", action="append", metavar="ID", help="may be repeated")
    parser.add_argument("--only", metavar="TEXT", help="items whose name has this in it")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin nothing after so many, and end then"
    )
    parser.add_argument("--list", action="store_true", help="print what would be measured")
    parser.add_argument(
        "--without-a-gpu", action="store_true", help="measure on the CPU, to try the command"
    )
    parser.add_argument("--worker", nargs=2, metavar=("PART", "SHARE"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def fingerprint() -> dict[str, Any]:
    """Return what figures are of: code, versions, device."""
    found = (path for pattern in MEASURING for path in sorted((ROOT / "tools").glob(pattern)))
    tools = [path.read_bytes() for path in found if path.name not in NOT_MEASURING]
    code = hashlib.sha256(b"".join([code_version().encode(), *tools])).hexdigest()
    return {"device": device_name(), "versions": library_versions(), "code": code}


def selected(arguments: argparse.Namespace) -> Checkpoints:
    """Return the checkpoints to measure; `BadInput` where there is nothing to measure."""
    if "cuda" not in available_devices() and not (arguments.without_a_gpu or arguments.list):
        raise BadInput(
            "no GPU here: torch sees none, so no kernel of one can be measured; --without-a-gpu "
            "tries the command on the CPU."
        )
    known = read_checkpoint_files(ROOT)
    names = arguments.checkpoint or list(known)
    for name in names:
        if name not in known:
            raise BadInput(f"--checkpoint {name}: not an id in fixtures/checkpoints.")
        if not known[name].directory.is_dir():
            raise BadInput(f"{known[name].source}: not there; run `make checkpoints`.")
    # A CPU build's own kernels are judged there.
    return {name: known[name] for name in names if arguments.checkpoint or known[name].golden}


def items_of(arguments: argparse.Namespace, known: Checkpoints) -> dict[str, list[str]]:
    """Return the selected parts' items."""
    unasked = [name for name, part in PARTS.items() if not part.on_request]
    found = {name: PARTS[name].items(known) for name in arguments.part or unasked}
    if arguments.only is not None:
        found = {name: [i for i in items if arguments.only in i] for name, items in found.items()}
    if not any(found.values()):
        raise BadInput("nothing is selected; --list names parts and items.")
    return found


def measure(arguments: argparse.Namespace, known: Checkpoints) -> int:
    """Measure what was not measured yet, and write all of it."""
    chosen = items_of(arguments, known)
    if arguments.list:
        for name, items in chosen.items():
            print(f"{name}: {PARTS[name].question}", *items, sep="\n    ")
        return 0
    out, of = arguments.out.absolute(), fingerprint()
    journals = {name: Journal(_work(out, of) / name) for name in PARTS}
    if arguments.worker is not None:
        part, share = arguments.worker
        journal = replace(journals[part], worker=int(share.split("/")[0]))
        work(part, journal, share_of(chosen[part], share), known, out)
        return 0
    command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    deadline = time.time() + arguments.minutes * 60
    # A machine that is lent for minutes ends what runs on it: the figures so far are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        for name, items in chosen.items():
            print(f"{name}: {PARTS[name].question}", file=sys.stderr, flush=True)
            journal, part = journals[name], PARTS[name]
            for item in items:  # what was not run is tried again
                if "not_run" in (journal.read(item) or {}):
                    journal.path(item).unlink()
            limits = Limits(part.minutes * 60, deadline)
            processes = min(side_by_side(), len(items)) if part.side_by_side else 1
            threads = {"OMP_NUM_THREADS": "1"} if part.side_by_side else {}
            environment = {**threads, **part.environment}
            supervise([*command, name], journal, items, limits, environment, processes)
    finally:
        status = report(out, of, {name: journal.everything() for name, journal in journals.items()})
    return status


def report(out: Path, of: Mapping[str, Any], found: Mapping[str, list[dict[str, Any]]]) -> int:
    """Write what was measured so far; return 1 where something was not run, 0 otherwise."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"schema": 1, "date": date, "command": sys.argv[1:], **of, "parts": found}
    write_atomically(out / "gpu.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / "gpu.md", markdown(content))
    missed = [(n, said) for n, items in found.items() for said in items if "not_run" in said]
    for name, said in missed:
        print(f"not run: {name}, {said['item']}: {said['not_run']}")
    print(f"wrote {out / 'gpu.json'} and gpu.md: {sum(map(len, found.values()))} items")
    return 1 if missed else 0


def _work(out: Path, of: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    return out / "measured" / digest


def main() -> int:
    """Measure; 2 for what the user can mend."""
    arguments = parse_arguments()
    try:
        return measure(arguments, selected(arguments))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

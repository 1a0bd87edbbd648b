"""The smallest fault that a limit still catches: one weight scale is made larger, bit by bit.

    python tools/smallest_fault.py --checkpoint tiny-reward-qwen2-w4a16 --dtype serving

Serves a checkpoint whose first quantized layer is multiplied by 1 + δ in the engine alone, for δ
from 1 down, and prints what `fidelity` measures beside what it allows, and beside what it allowed
when that was twice the rounding of a reference that rounds to nearest, without an error bar. The
smallest δ that each of the two catches is its resolution.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantgate.judging import fidelity
from quantgate.judging.budget import ROUNDING_FACTOR
from quantgate.measuring.case import Case
from quantgate.measuring.engine import set_environment
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import mean_absolute_difference
from quantgate.measuring.precision import FLOAT32, SERVING
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import stored_probe

ROOT = Path(__file__).resolve().parent.parent
FAULTS = [2.0**-power for power in range(21)]


@contextmanager
def scaled(factor: float) -> Iterator[None]:
    """Let emulated kernels multiply a model's first quantized layer's weight by a factor."""
    set_environment()
    import vllm.model_executor.kernels.linear  # noqa: F401  registers the emulated ones

    from quantgate.patches import emulated_kernels

    stock, first = emulated_kernels._hold, [True]

    def hold(layer: Any, weight: Any) -> None:
        stock(layer, weight * factor if first.pop() else weight)
        first.append(False)

    emulated_kernels._hold = hold
    try:
        yield
    finally:
        emulated_kernels._hold = stock


def old_limit(case: Case) -> float:
    """Return twice what rounding to nearest costs the reference on average."""
    return ROUNDING_FACTOR * mean_absolute_difference(case.rounded("rounds"), case.exact)


def main() -> int:
    """Print a line for each fault, and the smallest that is caught."""
    parser = argparse.ArgumentParser(description="Find the smallest fault that fidelity catches.")
    parser.add_argument("--checkpoint", required=True, metavar="ID")
    parser.add_argument("--dtype", choices=(FLOAT32, SERVING), default=SERVING)
    arguments = parser.parse_args()
    known = read_checkpoint_files(ROOT)
    if arguments.checkpoint not in known:
        print(f"error: --checkpoint {arguments.checkpoint}: no such file.", file=sys.stderr)
        return 2
    checkpoint = dataclasses.replace(known[arguments.checkpoint], base=None)
    whole = Lab(stored_probe, Ledger(lambda _: None))
    case = Case.of(checkpoint, arguments.dtype, whole)
    caught = {"old": 0.0, "new": 0.0}
    for fault in [*FAULTS, 0.0]:
        # References are kept from one fault to the next, engines are not.
        taken = whole.ledger.taken
        for key in [key for key in taken if not key.source.startswith("HF")]:
            del taken[key]
        with scaled(1 + fault):
            verdict = fidelity.compared(case)
        first = verdict.deviations[0]
        # What is judged value by value has the limit that it had.
        before = first.allowed if case.by_value else old_limit(case)
        found = {"new": first.exceeded, "old": not first.measured <= before}
        caught |= {limit: fault for limit, exceeded in found.items() if exceeded}
        print(
            f"δ {fault:<10.3g} {first.what} {first.measured:.4g}, allowed {first.allowed:.4g}"
            f"{' CAUGHT' if found['new'] else ''}, before {before:.4g}"
            f"{' CAUGHT' if found['old'] else ''}"
        )
    print(f"{checkpoint.id} {arguments.dtype}: smallest caught: {caught}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

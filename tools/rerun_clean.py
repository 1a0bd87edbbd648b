"""Count false alarms: rerun the embedded checkpoints under random serving settings.

    python tools/rerun_clean.py --runs 200

Nothing is wrong with these checkpoints, so every failure is a false alarm. Each run draws a
checkpoint, a dtype, and serving settings: order, batch limits, chunks, block size, prefix caching,
a KV cache that holds only part of the probe. It runs the checks that serving settings can affect:
fidelity, divergence, quality and drift. Exits 0 if none fails.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantgate.judging import compare, drift, fidelity, noise
from quantgate.judging.budget import quality_margin
from quantgate.judging.distributions import divergence_from_base
from quantgate.judging.golden import as_stored, from_json, golden_path, stored_dtype
from quantgate.judging.results import CheckResult, upheld
from quantgate.judging.verdict import Verdict
from quantgate.measuring import pooling, reruns
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.engine import running_engine
from quantgate.measuring.environment import available_devices
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.precision import FLOAT32, SERVING
from quantgate.measuring.session import provenance_of
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import actual_scheme, read_config
from quantgate.subject.probe import stored_probe
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (FLOAT32, SERVING)
BLOCK_SIZES = (32, 64, 128)
# Tokens per step, and concurrent sequences.
TOKENS = (64, 192, 1024, 4096, 16384)
SEQUENCES = (1, 3, 16, 256)
# The smallest holds a third of the probe in bfloat16, and a sixth in float32.
CACHE_BYTES = (12 << 20, 128 << 20)


def serve(case: Case, drawn: Mapping[str, Any], order: Sequence[int]) -> None:
    """Serve a case with drawn settings and window order; all its checks then read the result."""
    checkpoint = case.checkpoint
    arguments = pooling.pooling_arguments(checkpoint.directory, checkpoint.task)
    with running_engine(
        checkpoint.directory,
        settings=checkpoint.engine,
        dtype=case.dtype,
        **{**arguments, **drawn},
    ) as llm:
        provenance = provenance_of(llm, case.dtype)
        case.keep_engine(reruns.in_batches(llm, case.probe, [order], provenance))


def draw(rng: np.random.Generator, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return random engine settings; an encoder supports neither chunks nor a cache."""
    settings: dict[str, Any] = {"max_num_seqs": int(rng.choice(SEQUENCES))}
    if read_config(checkpoint.directory)["model_type"] == "bert":
        return settings
    return settings | {
        "max_num_batched_tokens": max(int(rng.choice(TOKENS)), settings["max_num_seqs"]),
        "enable_chunked_prefill": True,
        "enable_prefix_caching": bool(rng.random() < 0.5) and checkpoint.task == GENERATE,
        "block_size": int(rng.choice(BLOCK_SIZES)),
        "kv_cache_memory_bytes": int(rng.choice(CACHE_BYTES)),
    }


def checks(case: Case) -> Iterator[tuple[str, Verdict]]:
    """Yield every check that serving settings can affect, with its verdict."""
    checkpoint, engine, probe = case.checkpoint, case.engine, case.probe
    dtype = stored_dtype(case.dtype)
    yield f"fidelity-{dtype}", fidelity.free_running(case)
    if checkpoint.golden:
        path = golden_path(ROOT, checkpoint.id, f"drift-{dtype}", engine.provenance.platform)
        golden = from_json(path.read_text(encoding="utf-8"), probe, path).measurement
        yield f"drift-{dtype}", drift.against(case, as_stored(engine), golden)
    if case.dtype == FLOAT32 or checkpoint.task != GENERATE:
        return
    yield "divergence-from-reference", fidelity.divergence(case)
    if (base := case.base) is not None:
        margin = quality_margin(checkpoint, actual_scheme(checkpoint.directory))
        yield "quality", compare.quality(engine, base.engine, probe, margin=margin)
        found = case.divergence(base.engine, engine, probe, base_of=base)
        verdict = divergence_from_base(engine, base.engine, found, probe, margin=margin)
        yield "divergence-from-base", verdict


def rerun(
    number: int, seed: int, known: list[Checkpoint]
) -> tuple[dict[str, Any], list[CheckResult]]:
    """Judge one checkpoint under one draw of settings; return the draw and the results."""
    rng = np.random.default_rng((seed, number))
    checkpoint = known[rng.integers(len(known))]
    lab = Lab(
        stored_probe,
        Ledger(lambda _: None, DiskCache(ROOT / ".gate-cache")),
    )
    case = Case.of(checkpoint, DTYPES[rng.integers(2)], lab)
    drawn = draw(rng, checkpoint)
    serve(case, drawn, rng.permutation(len(case.probe.windows)).tolist())
    return drawn, upheld(
        [
            CheckResult(checkpoint.id, "", name, noise.beside(found, lambda: noise.floor_of(case)))
            for name, found in checks(case)
        ]
    )


def main() -> int:
    """Command-line entry point: run, and count outcomes."""
    parser = argparse.ArgumentParser(description="Count false alarms of the gate.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", action="append", metavar="ID", help="only these")
    arguments = parser.parse_args()
    wanted = arguments.checkpoint
    (device,) = available_devices()
    # No engine has run yet: all that a known failure may depend on is whose kernels they are.
    kernels = ["CPU"] if device == "cpu" else []
    known = [
        checkpoint
        for name, checkpoint in read_checkpoint_files(ROOT).items()
        if not any(f.applies(kernels) for f in checkpoint.known_failure)
        and (not wanted or name in wanted)
    ]
    if not known:
        print("error: --checkpoint names no embedded checkpoint.", file=sys.stderr)
        return 2
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(arguments.runs):
        drawn, results = rerun(number, arguments.seed, known)
        for result in results:
            outcomes[result.verdict.outcome] += 1
            if result.verdict.outcome != "pass":
                print(f"run {number}, {drawn}", flush=True)
                print(result.verdict.message(f"{result.checkpoint} {result.check}"), flush=True)
        if sys.stderr.isatty() or number % 20 == 19:
            minutes = (time.monotonic() - started) / 60
            print(f"  {number + 1} of {arguments.runs} runs, {minutes:.1f} min", file=sys.stderr)
    counted = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"{arguments.runs} reruns, {outcomes.total()} checks: {counted}")
    return 1 if outcomes["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())

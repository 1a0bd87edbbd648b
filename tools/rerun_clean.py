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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantgate.judging import compare, drift, fidelity, noise
from quantgate.judging.budget import quality_margin
from quantgate.judging.golden import as_stored, from_json, golden_path
from quantgate.judging.results import CheckResult, upheld
from quantgate.judging.verdict import Verdict
from quantgate.measuring import pooling, serving
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.engine import provenance_of, running_engine
from quantgate.measuring.environment import available_devices
from quantgate.measuring.measurement import Measurement
from quantgate.measuring.precision import SERVING, resolve_dtype
from quantgate.measuring.sources import Sources
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import actual_scheme, read_config
from quantgate.subject.probe import embedded_probe
from quantgate.subject.task import GENERATE

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float32", SERVING)
BLOCK_SIZES = (32, 64, 128)
# Tokens per step, and concurrent sequences.
TOKENS = (64, 192, 1024, 4096, 16384)
SEQUENCES = (1, 3, 16, 256)
# The smallest holds a third of the probe in bfloat16, and a sixth in float32.
CACHE_BYTES = (12 << 20, 128 << 20)


@dataclass(eq=False)
class Redrawn(Sources):
    """Sources that serve the checkpoint under test with the settings in `drawn`."""

    drawn: Mapping[str, Any] = field(default_factory=dict)
    order: Any = None

    def engine(self, checkpoint: Checkpoint, dtype: str) -> Measurement:
        """Measure a base as usual, and the checkpoint under test with the drawn settings."""
        if checkpoint.is_base:
            return super().engine(checkpoint, dtype)
        dtype = resolve_dtype(checkpoint, dtype)
        return self.once(
            f"vLLM {self.drawn}", checkpoint, dtype, lambda: self._serve(checkpoint, dtype)
        )

    def _serve(self, checkpoint: Checkpoint, dtype: str) -> Measurement:
        arguments = pooling.pooling_arguments(checkpoint.directory, checkpoint.task)
        with running_engine(
            checkpoint.directory,
            settings=checkpoint.engine,
            dtype=dtype,
            **{**arguments, **self.drawn},
        ) as llm:
            provenance = provenance_of(llm, dtype)
            return serving.in_batches(llm, self.probe_of(checkpoint), [self.order], provenance)


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


def checks(sources: Sources, checkpoint: Checkpoint, dtype: str) -> Iterator[tuple[str, Verdict]]:
    """Yield every check that serving settings can affect, with its verdict."""
    yield f"fidelity-{dtype}", fidelity.free_running(sources, checkpoint, dtype)
    engine, probe = sources.engine(checkpoint, dtype), sources.probe_of(checkpoint)
    if checkpoint.golden:
        path = golden_path(ROOT, checkpoint.id, f"drift-{dtype}", engine.provenance.platform)
        golden = from_json(path.read_text(encoding="utf-8"), probe, path).measurement
        verdict = drift.against(sources, checkpoint, dtype, as_stored(engine), golden)
        yield f"drift-{dtype}", verdict
    if dtype == "float32" or checkpoint.task != GENERATE:
        return
    yield "divergence-from-reference", fidelity.divergence(sources, checkpoint)
    base = checkpoint.base_checkpoint
    if base is not None:
        unquantized = sources.engine(base, dtype)
        margin = quality_margin(checkpoint, actual_scheme(checkpoint.directory))
        found = sources.divergence(unquantized, base, engine, checkpoint, probe)
        yield "quality", compare.quality(engine, unquantized, probe, margin=margin)
        yield (
            "divergence-from-base",
            compare.divergence_from_base(engine, unquantized, found, probe, margin=margin),
        )


def rerun(number: int, seed: int, sources: Redrawn, known: list[Checkpoint]) -> list[CheckResult]:
    """Judge one checkpoint under one draw of settings."""
    rng = np.random.default_rng((seed, number))
    checkpoint = known[rng.integers(len(known))]
    dtype = DTYPES[rng.integers(2)]
    sources.drawn = draw(rng, checkpoint)
    sources.order = rng.permutation(len(sources.probe_of(checkpoint).windows)).tolist()
    results = [
        CheckResult(
            checkpoint.id,
            "",
            name,
            noise.beside(verdict, lambda: noise.floor_of(sources, checkpoint, dtype)),
        )
        for name, verdict in checks(sources, checkpoint, dtype)
    ]
    return upheld(results)


def main() -> int:
    """Command-line entry point: run, and count outcomes."""
    parser = argparse.ArgumentParser(description="Count false alarms of the gate.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", action="append", metavar="ID", help="only these")
    arguments = parser.parse_args()
    wanted = arguments.checkpoint
    (device,) = available_devices()
    known = [
        checkpoint
        for name, checkpoint in read_checkpoint_files(ROOT).items()
        if not any(f.applies(on_processor=device == "cpu") for f in checkpoint.known_failure)
        and (not wanted or name in wanted)
    ]
    if not known:
        print("error: --checkpoint names no embedded checkpoint.", file=sys.stderr)
        return 2
    outcomes: Counter[str] = Counter()
    started = time.monotonic()
    for number in range(arguments.runs):
        sources = Redrawn(
            lambda task, quality: embedded_probe(ROOT, task, quality=quality),
            lambda _: None,
            DiskCache(ROOT / ".gate-cache"),
        )
        for result in rerun(number, arguments.seed, sources, known):
            outcomes[result.verdict.outcome] += 1
            if result.verdict.outcome != "pass":
                print(f"run {number}, {sources.drawn}", flush=True)
                print(result.verdict.message(f"{result.checkpoint} {result.check}"), flush=True)
        if sys.stderr.isatty() or number % 20 == 19:
            minutes = (time.monotonic() - started) / 60
            print(f"  {number + 1} of {arguments.runs} runs, {minutes:.1f} min", file=sys.stderr)
    counted = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    print(f"{arguments.runs} reruns, {outcomes.total()} checks: {counted}")
    return 1 if outcomes["fail"] else 0


if __name__ == "__main__":
    sys.exit(main())

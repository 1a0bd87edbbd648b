"""Made-up results of a run, with something in every field that a report has."""

from quantgate.audit.finding import Finding
from quantgate.judging.results import CheckResult
from quantgate.judging.verdict import Deviation, Profile, Verdict, WorstToken
from quantgate.measuring.engine import EngineLife
from quantgate.reporting.run import Run
from quantgate.reporting.shard import Shard
from quantgate.subject.passage import Passage
from quantgate.subject.probe import ScoredProbe
from quantgate.subject.tier import RunTier

PROBE = ScoredProbe("tiny", "f" * 64, "0123456789ab" + "0" * 52, 30, 32, 3840)


def result(checkpoint: str) -> CheckResult:
    worst = WorstToken("doc[3]", Passage("x", "y", "z"), "", -1.5, float("-inf"))
    finding = Finding("scale", "error", "m.weight", "nan", "finite", "model.safetensors")
    verdict = Verdict(
        "pass",
        "fine",
        (Deviation("max |Δ|", 0.1 + 0.2, 1e-5, floor=float("nan"), statistic="max_abs"),),
        {"mean KLD": float("inf")},
        n=7,
        dtype="bfloat16",
        kernels={"qkv_proj": "Kernel"},
        findings=(finding,),
        evidence=("a line",),
        profile=Profile(((0, 0.5, 1.0),), (worst,), (1, 2)),
    )
    return CheckResult(
        checkpoint, "W4A16", "quality", verdict, 1.25, base="org/base", probes=(PROBE,)
    )


def run_of(
    shard: Shard, started: str = "2026-11-27T10:00:00+00:00", duration_s: float = 60.0
) -> Run:
    return Run(
        [result(name) for name in shard.own],
        started,
        duration_s,
        {"vllm": "0.32.0", "machine": "x86_64"},
        left_out=[("a drift on cpu", "it has no golden")],
        notes=["a note"],
        engines=[EngineLife(f"/models/{name}", "bfloat16", 1.5, 2.5) for name in shard.own],
        histories={name: [{"date": "2026-11-01", "mean NLL": 1.5}] for name in shard.own},
        tiers={name: RunTier("standard", "standard") for name in shard.own},
        shard=shard,
    )

"""What a replay's errors say, and what a capture keeps."""

import dataclasses
import gc
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantgate.judging.attribution import Suspects, attribute
from quantgate.judging.modules import modules_beyond, replayed
from quantgate.judging.verdict import Deviation, Verdict
from quantgate.measuring import engine
from quantgate.measuring.capture import Capture
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.replay import ModuleError, Replay
from quantgate.subject.probe import Probe, Window
from quantgate.subject.windows import REPLAY_TOKENS, replay_windows

# Attribution -------------------------------------------------------------------------------------


def measurement(value: float, dtype: str = "float32") -> Measurement:
    provenance = Provenance("engine", "cpu", "cpu", dtype, {"mlp.down_proj": "SomeKernel"})
    return Measurement(np.full(6, value, np.float32), np.zeros(6, np.int32), provenance)


REPLAY = Replay(
    (ModuleError("layers.0.mlp.down_proj", "layers.0.mlp.down_proj", 0.5, 0.0),),
    np.zeros(6, np.float32),
    np.full(6, -1.0, np.float32),
)
SIX = Probe("p", 9, (Window("d", "prose", 1, tuple(range(7)), ""),))
FAILED = Verdict("fail", "off")
DEVIATION = Deviation("max", 1.0, 0.1)
SUSPECTS = Suspects(
    engine=measurement(-1.0),
    own=measurement(-2.0),
    library=lambda: measurement(-1.0),
    disagreement=lambda: ("no quantized linear", 0.0),
    base=lambda: Verdict("pass", "fine"),
    modules=lambda: modules_beyond(measurement(-1.0), REPLAY),
)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, "ENGINE: both dequantizers agree on every weight, and the unquantized base is"),
        ({"base": None}, "ENGINE: both dequantizers agree on every weight"),
        ({"own": measurement(float("nan"))}, "CHECKPOINT: 6 log-probs of the reference are not"),
        (
            {"disagreement": lambda: ("layers.0.mlp.up_proj", 0.3)},
            "REFERENCE: the two dequantizers differ by 0.3 on layers.0.mlp.up_proj; the engine is "
            "1 nat per token from the reference over ours, 0 from",
        ),
        ({"disagreement": lambda: ("layers.0.mlp.up_proj", float("nan"))}, "REFERENCE: "),
        (
            {"base": lambda: dataclasses.replace(FAILED, deviations=(DEVIATION,))},
            "ENVIRONMENT: the unquantized base under the same settings is off too (max is 1 nat",
        ),
    ],
)
def test_a_failure_is_attributed(change: dict[str, Any], fault: str) -> None:
    verdict = attribute(FAILED, dataclasses.replace(SUSPECTS, **change))
    assert verdict.attribution.startswith(fault)
    if fault.startswith("ENGINE"):
        assert verdict.evidence[-1].startswith("module     layers.0.mlp.down_proj: output 0.5")
        assert verdict.evidence[-1].endswith("SomeKernel")
    assert f"fault      {verdict.attribution}" in verdict.message("x")


OFF = {"layers.0.q": (0.5, 0.0), "layers.0.k": (1e-7, 0.2), "layers.0.v": (1e-7, 1e-7)}


def replay_of(modules: dict[str, tuple[float, float]], values: float = -1.0) -> Replay:
    errors = tuple(ModuleError(name, name, *off) for name, off in modules.items())
    return Replay(errors, np.full(6, values, np.float32), np.full(6, -1.0, np.float32))


def lines_of_modules(dtype: str, found: Replay) -> list[str]:
    """What a failed replay says of modules, attributed to the engine."""
    engine = measurement(-1.0, dtype)
    verdict = replayed(engine, found, SIX, rounding=lambda: np.zeros(6))
    suspects = dataclasses.replace(
        SUSPECTS, engine=engine, modules=lambda: modules_beyond(engine, found)
    )
    attributed = attribute(dataclasses.replace(verdict, outcome="fail"), suspects)
    return [line for line in attributed.evidence if line.startswith("module ")]


def test_replay_lists_what_is_beyond_its_limit_and_once() -> None:
    first, second = lines_of_modules("float32", replay_of(OFF))
    assert first.startswith("module     layers.0.q: output 0.5")
    assert second.startswith("module     layers.0.k: output 1e-07, input 0.2 of its rms")
    assert second.endswith("its product is right, what feeds it is not")
    (only,) = lines_of_modules("bfloat16", replay_of(OFF))  # inputs are not judged there
    assert only.startswith("module     layers.0.q")
    (nan,) = lines_of_modules("float32", replay_of({"layers.0.q": (float("nan"), 0.0)}))
    assert "output nan" in nan


ON_HOPPER = {"mlp.down_proj": "CutlassFP8ScaledMMLinearKernel"}


@pytest.mark.parametrize(
    ("kernels", "platform", "depth", "off", "outcome"),
    [
        (ON_HOPPER, "sm90", 512, 5.84e-4, "pass"),  # an H200's, in float16
        (ON_HOPPER, "sm90", 512, 1.3e-3, "fail"),
        (ON_HOPPER, "sm90", 14336, 5e-3, "pass"),
        (ON_HOPPER, "sm90", 14336, 7e-3, "fail"),
        (ON_HOPPER, "sm100", 512, 5.84e-4, "fail"),
        ({"mlp.down_proj": "MacheteLinearKernel"}, "sm90", 512, 5.84e-4, "fail"),
        ({"mlp.down_proj": "CutlassFp8BlockScaledMMKernel"}, "sm90", 512, 5.84e-4, "fail"),
    ],
)
def test_fp8_tensor_cores_may_truncate_a_sum(
    kernels: dict[str, str], platform: str, depth: int, off: float, outcome: str
) -> None:
    """By what a sum of that many products loses, and only where whole sums stay in them."""
    engine = measurement(-1.0, "float16")
    provenance = dataclasses.replace(engine.provenance, kernels=kernels, platform=platform)
    engine = dataclasses.replace(engine, provenance=provenance)
    module = ModuleError("layers.0.mlp.down_proj", "layers.0.mlp.down_proj", off, 0.0, depth)
    found = Replay((module,), np.full(6, -1.0, np.float32), np.full(6, -1.0, np.float32))
    verdict = replayed(engine, found, SIX, rounding=lambda: np.zeros(6))
    assert verdict.outcome == outcome
    (line,) = modules_beyond(engine, found)
    assert ("no linear is off by more" in line) == (outcome == "pass")


def test_the_module_furthest_beyond_its_own_limit_is_named() -> None:
    engine = measurement(-1.0, "float16")
    kernels = {**ON_HOPPER, "mlp.up_proj": "MacheteLinearKernel"}
    provenance = dataclasses.replace(engine.provenance, kernels=kernels, platform="sm90")
    engine = dataclasses.replace(engine, provenance=provenance)
    modules = (
        ModuleError("down", "layers.0.mlp.down_proj", 1e-3, 0.0, 512),
        ModuleError("up", "layers.0.mlp.up_proj", 6e-4, 0.0, 512),
    )
    found = Replay(modules, np.full(6, -1.0, np.float32), np.full(6, -1.0, np.float32))
    verdict = replayed(engine, found, SIX, rounding=lambda: np.zeros(6))
    assert verdict.outcome == "fail"
    assert "(up)" in verdict.detail
    (line,) = modules_beyond(engine, found)
    assert line.startswith("module     up: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_no_linear_is_off_replay_says_what_it_does_not_see(dtype: str) -> None:
    (line,) = lines_of_modules(dtype, replay_of({"layers.0.q": (1e-7, 1e-7)}, values=-3.0))
    assert line.startswith("module     no linear is off by more than ")
    assert "replay does not see embeddings, norms, attention and the head" in line


def test_what_does_not_fail_is_nobodys_fault() -> None:
    assert attribute(Verdict("pass", "fine"), SUSPECTS).attribution == ""


# Captures ----------------------------------------------------------------------------------------


@given(
    ranks=st.sampled_from([1, 2, 4]),
    heads=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_the_ranks_of_a_capture_are_put_together(
    tmp_path_factory: pytest.TempPathFactory,
    ranks: int,
    heads: int,
    tokens: int,
    data: st.DataObject,
) -> None:
    """q is split by rank; k and v too, or several ranks hold the same of their heads."""
    directory = tmp_path_factory.mktemp("capture")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    sizes = (6, 8, 2 * heads, 8, 6)
    x, q, k, o_in, o_out = (torch.randn(tokens, n, generator=generator) for n in sizes)
    replicas = max(1, ranks // heads)
    own = 2 * heads * replicas // ranks
    layouts = {
        "qk": {
            "shards": {"q": [[8 // ranks, 1]], "k": [[own, replicas]]},
            "ranks_split": "output" if ranks > 1 else "nothing",
            "heads": None,
        },
        "o": {
            "shards": {"o": [[6, 1]]},
            "ranks_split": "input" if ranks > 1 else "nothing",
            "heads": None,
        },
    }
    for rank in range(ranks):
        k_at = rank // replicas * own
        seen = {
            "qk.input": x,
            "qk.output": torch.cat([q.chunk(ranks, dim=1)[rank], k[:, k_at : k_at + own]], dim=1),
            "o.input": o_in.chunk(ranks, dim=1)[rank].contiguous(),
            "o.output": o_out,
        }
        path = directory / f"3.{rank}.safetensors"
        save_file(seen, path, {"layouts": json.dumps(layouts), "renamed": "{}"})
    capture = Capture(directory, (3,), np.zeros(4, np.float32))
    for name, given_in, given_out in (("q", x, q), ("k", x, k), ("o", o_in, o_out)):
        found = capture.seen(name, 3)
        assert torch.equal(found.input, given_in)
        assert torch.equal(found.output, given_out)
    assert capture.module_of("k") == "qk"
    assert "v" not in capture


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(2, 900)), min_size=1, max_size=9),
)
def test_few_tokens_of_every_stratum_are_captured(shapes: list[tuple[str, int]]) -> None:
    windows = tuple(Window(f"{i}", s, 1, (3,) * n, "") for i, (s, n) in enumerate(shapes))
    chosen = replay_windows(Probe("p", 5, windows))
    strata = [windows[i].stratum for i in chosen]
    assert len(set(chosen)) == len(chosen) >= 1
    assert len(windows[chosen[0]].ids) == min(n for _, n in shapes)
    # None has a second window before each has its first.
    assert len(set(strata)) in (len(strata), len({s for s, _ in shapes}))
    tokens = sum(len(windows[i].ids) for i in chosen)
    assert len(chosen) == 1 or tokens <= REPLAY_TOKENS


def test_garbage_is_collected_again_after_an_engine_that_failed() -> None:
    collect, freeze, unfreeze = gc.collect, gc.freeze, gc.unfreeze

    def fail() -> None:
        with engine._collection_suspended():
            assert gc.collect is not collect
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (gc.collect, gc.freeze, gc.unfreeze) == (collect, freeze, unfreeze)

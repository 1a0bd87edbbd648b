"""Replay: what it sees of real engines that are wrong in one place, and whose fault it says."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunGate
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantgate.formats import library_weights
from quantgate.formats.weights import dequantize_weight
from quantgate.judging import compare, fidelity
from quantgate.judging.attribution import Suspects, attribute
from quantgate.judging.verdict import Deviation, Verdict
from quantgate.measuring import engine, parameters
from quantgate.measuring.capture import Capture
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.replay import ModuleError, Replay, replay
from quantgate.measuring.sources import Sources
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.probe import Probe, Window

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)


def quiet(_: str) -> None:
    pass


def served_and_replayed(
    directory: Path, probe: Probe, into: Path, settings: EngineSettings = SETTINGS
) -> tuple[Measurement, Replay]:
    measured, capture = engine.measure(
        directory, probe, settings=settings, dtype="float32", announce=quiet, capture_into=into
    )
    assert capture is not None
    return measured, replay(directory, probe, capture, announce=quiet)


# Faults of an engine, each in one place ----------------------------------------------------------


def test_a_fault_of_one_kernel_is_found_where_it_is(
    quantized: Path, small_probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A millionth of one module's weights is off: no log-probability shows it, replay does."""
    import vllm.model_executor.kernels.linear  # noqa: F401  first: it brings the emulated ones

    from quantgate.patches import emulated_kernels

    honest = emulated_kernels.dequantize_groups
    calls = iter(range(1000))

    def faulty(code: Any, scale: Any, offset: Any) -> torch.Tensor:
        weight: torch.Tensor = honest(code, scale, offset)
        if next(calls) == 7:  # four a layer, in order: the second layer's down_proj
            weight[17] *= 1.01
        return weight

    monkeypatch.setattr(emulated_kernels, "dequantize_groups", faulty)
    measured, found = served_and_replayed(quantized, small_probe, tmp_path)
    verdict = compare.replayed(measured, found, small_probe)
    assert verdict.outcome == "fail"
    off = [module.name for module in found.modules if module.output > 1e-5]
    assert off == ["model.layers.1.mlp.down_proj"]
    assert verdict.evidence[0].startswith("module     model.layers.1.mlp.down_proj: output 0.0")
    assert verdict.evidence[0].endswith("DequantizingLinearKernel")
    assert verdict.kernels["mlp.down_proj"] == "DequantizingLinearKernel"


def change(project: Path, name: str, edit: Callable[[str], str]) -> None:
    path = project / "fixtures" / "checkpoints" / f"{name}.toml"
    path.write_text(edit(path.read_text()))


def test_a_cache_of_another_dtype_is_an_environments_fault(run_gate: RunGate) -> None:
    """vLLM takes a bfloat16 cache for a float32 engine on CPU, and computes nonsense silently."""
    change(
        run_gate.project,
        "tiny-llama-w4a16",
        lambda text: f'{text}kv_cache_dtype = "bfloat16"\n',
    )
    result = run_gate("suites", "-k", "replay and float32", "--gate-report", "report")
    assert result.returncode == 1, result.stdout
    ((check,),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert check["verdict"] == "fail"
    assert check["attribution"].startswith("ENVIRONMENT: the unquantized base")
    assert "self_attn.o_proj: output" in result.stdout
    assert "Traceback" not in result.stdout


def seven_bits(source: Path, target: Path) -> None:
    """Write a checkpoint's like with weights within ±64: pairs of products do not saturate."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8:
            tensors[name] = (tensor.float() / 2).round().to(torch.int8)
        elif name.endswith("weight_scale"):
            tensors[name] = tensor * 2
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def native_int8(run_gate: RunGate, root: Path, *, known: bool) -> None:
    """Gate vLLM's own int8 kernel, with or without its known failures on file."""
    name = "tiny-llama-w8a8-native"
    text = (root / "fixtures" / "checkpoints" / f"{name}.toml").read_text()
    path = run_gate.project / "fixtures" / "checkpoints" / f"{name}.toml"
    path.write_text(text if known else text.partition("[[known_failure]]")[0])
    run_gate.remove_its_checkpoint()


# What oneDNN takes for the processor's instructions: none of VNNI's.
NO_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_int8_products_that_saturate_fail_and_are_the_engines_fault(
    run_gate: RunGate, root: Path, tmp_path: Path
) -> None:
    native_int8(run_gate, root, known=False)
    seven_bits(root / "build" / "tiny-llama-w8a8", tmp_path / "seven-bits")
    text = (
        run_gate.project / "fixtures" / "checkpoints" / "tiny-llama-w8a8-native.toml"
    ).read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("revision", "source"))]
    path = run_gate.project / "fixtures" / "checkpoints" / "seven-bits.toml"
    path.write_text("\n".join([f'source = "{tmp_path / "seven-bits"}"', *lines]) + "\n")
    few = "float32 and not invariance"
    result = run_gate("suites", "-k", few, "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 1, result.stdout
    seven, eight = run_gate.report["checkpoints"]
    assert seven["verdict"] == "pass"
    checks = {check["name"]: check for check in eight["checks"]}
    for check in checks.values():
        assert check["verdict"] == "fail"
        assert check["attribution"].startswith("ENGINE: both dequantizers agree on every weight")
        assert "CPUInt8ScaledMMLinearKernel" in check["kernels"].values()
    assert checks["replay-float32"]["measured"] > 1e-3
    assert "module     model.layers." in result.stdout
    assert "CPUInt8ScaledMMLinearKernel" in result.stdout


def test_a_known_failure_is_shown_and_does_not_count(run_gate: RunGate, root: Path) -> None:
    native_int8(run_gate, root, known=True)
    result = run_gate("suites", "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 0, result.stdout
    (checks,) = [c["checks"] for c in run_gate.report["checkpoints"]]
    failed = {check["name"]: check for check in checks if check["verdict"] == "fail"}
    assert set(failed) >= {"fidelity-float32", "replay-float32", "replay-serving"}
    assert all("VNNI" in check["known_failure"] for check in failed.values())
    assert run_gate.report["verdict"] == "pass"
    assert "FAIL (known)" in result.stdout
    assert 'skipped type="known-failure"' in (run_gate.project / "report/junit.xml").read_text()


def test_a_known_failure_that_is_gone_is_a_failure(run_gate: RunGate, root: Path) -> None:
    """Unless it is said to be one that may pass."""
    native_int8(run_gate, root, known=True)
    change(
        run_gate.project,
        "tiny-llama-w8a8-native",
        lambda text: text.replace('"native"', '"portable"'),
    )
    few = "serving and not invariance"
    result = run_gate("suites", "-k", few, "--gate-report", "report", **NO_VNNI)
    assert result.returncode == 1
    assert "it passes, but is listed as a known failure" in result.stdout
    ((fidelity, replay),) = [c["checks"] for c in run_gate.report["checkpoints"]]
    assert (fidelity["name"], fidelity["verdict"]) == ("fidelity-serving", "pass")
    assert (replay["name"], replay["verdict"]) == ("replay-serving", "fail")


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
    replay=lambda: REPLAY,
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
    verdict = compare.replayed(engine, found, SIX)
    suspects = dataclasses.replace(SUSPECTS, engine=engine, replay=lambda: found)
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_no_linear_is_off_replay_says_what_it_does_not_see(dtype: str) -> None:
    (line,) = lines_of_modules(dtype, replay_of({"layers.0.q": (1e-7, 1e-7)}, values=-3.0))
    assert line.startswith("module     no linear is off by more than ")
    assert "replay does not see embeddings, norms, attention and the head" in line


def test_what_does_not_fail_is_nobodys_fault() -> None:
    assert attribute(Verdict("pass", "fine"), SUSPECTS).attribution == ""


def fidelity_of(directory: Path, probe: Probe) -> Verdict:
    few = dataclasses.replace(probe, windows=probe.windows[:3])
    return fidelity.float32(
        Sources(lambda *_: few, quiet), Checkpoint(id="x", source=str(directory), engine=SETTINGS)
    )


def test_a_damaged_scale_is_the_checkpoints_fault(quantized_copy: Path, probe: Probe) -> None:
    path = quantized_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight_scale"][3, 1] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    verdict = fidelity_of(quantized_copy, probe)
    assert verdict.outcome == "fail"
    assert verdict.attribution.startswith("CHECKPOINT: ")


def test_a_wrong_dequantizer_is_the_references_fault(
    quantized: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours forgets a zero point of one; the engine sides with the library's."""

    def wrong(tensors: Any, weights: Any) -> torch.Tensor:
        return dequantize_weight(tensors, weights) + 1e-3

    monkeypatch.setattr(parameters, "dequantize_weight", wrong)
    monkeypatch.setattr(library_weights, "dequantize_weight", wrong)
    verdict = fidelity_of(quantized, probe)
    assert verdict.outcome == "fail"
    assert verdict.attribution.startswith("REFERENCE: the two dequantizers differ by")
    assert "e-07 from the one over compressed-tensors'" in verdict.attribution


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
    chosen = engine.replay_windows(Probe("p", 5, windows))
    strata = [windows[i].stratum for i in chosen]
    assert len(set(chosen)) == len(chosen) >= 1
    assert len(windows[chosen[0]].ids) == min(n for _, n in shapes)
    # None has a second window before each has its first.
    assert len(set(strata)) in (len(strata), len({s for s, _ in shapes}))
    tokens = sum(len(windows[i].ids) for i in chosen)
    assert len(chosen) == 1 or tokens <= engine.REPLAY_TOKENS


def test_garbage_is_collected_again_after_an_engine_that_failed() -> None:
    collect, freeze, unfreeze = gc.collect, gc.freeze, gc.unfreeze

    def fail() -> None:
        with engine._collection_suspended():
            assert gc.collect is not collect
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (gc.collect, gc.freeze, gc.unfreeze) == (collect, freeze, unfreeze)

"""The reference on another device than the CPU: through the same code, with the same scores."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_device import DEVICE, made_up_device
from made_up_logits import linear, sides
from small_models import SHORT, quiet, save_random, small_models
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantgate.errors import BadInput
from quantgate.formats import builds
from quantgate.formats.builds import Narrowing
from quantgate.formats.stored import LoadedTensors, StoredTensors
from quantgate.measuring import empty_model, engine, reference, reference_device, session
from quantgate.measuring import lab as measuring_lab
from quantgate.measuring.cache import DiskCache
from quantgate.measuring.case import Case
from quantgate.measuring.divergence import Side, divergence
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.measurement import Measurement, Provenance
from quantgate.measuring.replay import replay
from quantgate.measuring.streamed_model import StreamedModel
from quantgate.subject.checkpoint import Checkpoint, EngineSettings
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe, embedded_probe, probe_for
from quantgate.subject.task import GENERATE, Task

pytestmark = pytest.mark.long

ONE_BY_ONE = 0  # tokens a step: the CPU's way


def both(
    directory: Path, probe: Probe, dtype: str = "float32", narrowing: Narrowing = "rounds"
) -> tuple[Measurement, Measurement]:
    """Measure on the CPU, with the attention that other devices have, and on the made-up one."""
    with sdpa_kernel(SDPBackend.MATH):
        here = reference.measure(directory, probe, dtype=dtype, announce=quiet, narrowing=narrowing)
    with made_up_device():
        there = reference.measure(
            directory, probe, dtype=dtype, announce=quiet, narrowing=narrowing, device=DEVICE
        )
    return here, there


def require_same(here: Measurement, there: Measurement) -> None:
    assert there.values.tobytes() == here.values.tobytes()
    assert there.top1.tobytes() == here.top1.tobytes()
    assert (there.hidden is None) == (here.hidden is None)
    if here.hidden is not None and there.hidden is not None:
        assert there.hidden.tobytes() == here.hidden.tobytes()


@pytest.mark.parametrize(
    ("name", "dtype", "narrowing"),
    [
        ("tiny-llama-w4a16-actorder", "float32", "rounds"),
        ("tiny-llama-w4afp8", "bfloat16", "rounds"),
        ("tiny-llama-w8a8-static-asym", "float32", "rounds"),
        ("tiny-llama-w8a8", "bfloat16", "truncates"),
        ("tiny-llama-fp8-kv", "bfloat16", "rounds"),
        ("tiny-llama-fp8-block", "float32", "rounds"),
        ("tiny-llama-nvfp4", "float64", "rounds"),
        ("tiny-llama-mxfp4a16", "float32", "rounds"),
        ("tiny-ner-bert-w8a8", "float32", "rounds"),
        ("tiny-colbert-bert-w4a16", "float32", "rounds"),
        ("tiny-reward-qwen2-w4a16", "bfloat16", "rounds"),
        ("tiny-prm-qwen2-fp8-dynamic", "float32", "rounds"),
    ],
)
def test_scores_of_checkpoints_are_the_cpus(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, narrowing: Narrowing
) -> None:
    """Bit for bit, as long as windows go one by one: a tensor left on the CPU is an error."""
    monkeypatch.setattr(reference_device, "TOKENS_PER_STEP", ONE_BY_ONE)
    directory = root / "build" / name
    probe, _ = probe_for(embedded_probe(root, task_of(root, name), quality=False), directory)
    few = replace(probe, windows=probe.windows[:2])
    here, there = both(directory, few, dtype, narrowing)
    require_same(here, there)
    assert there.provenance.device == DEVICE.partition(":")[0]


def task_of(root: Path, name: str) -> Task:
    known = read_checkpoint_files(root)
    return known[name].task if name in known else GENERATE  # act-order has no file


@pytest.mark.parametrize("name", sorted(small_models()))
def test_scores_of_architectures_are_the_cpus(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_device, "TOKENS_PER_STEP", ONE_BY_ONE)
    save_random(small_models()[name], tmp_path)
    require_same(*both(tmp_path, SHORT))


def leave_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = empty_model._compute_buffers
    monkeypatch.setattr(
        empty_model, "_compute_buffers", lambda model, _: compute(model, torch.device("cpu"))
    )


def leave_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedTensors, "read", lambda self, name: self.stored.read(name))


def leave_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = StreamedModel.scores

    def forgetful(self: StreamedModel, *arguments: Any) -> Any:
        self.device = torch.device("cpu")
        return scores(self, *arguments)

    monkeypatch.setattr(StreamedModel, "scores", forgetful)


@pytest.mark.parametrize(
    ("leave", "name"),
    [
        (leave_buffers, "tiny-ner-bert-w4a16"),  # a Llama moves its own, at every step
        (leave_weights, "tiny-llama-w4a16"),
        (leave_targets, "tiny-llama-w4a16"),
    ],
)
def test_a_forgotten_transfer_is_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, leave: Any, name: str
) -> None:
    """What the made-up device is for."""
    leave(monkeypatch)
    probe = replace(SHORT, task=task_of(root, name))
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        both(root / "build" / name, probe)


def test_windows_that_go_together_have_their_own_scores(
    root: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of two lengths, mixed: products of other numbers of rows round otherwise."""
    short = [w for w in probe.windows if len(w.ids) == len(probe.windows[0].ids)][:3]
    cut = replace(short[1], ids=short[1].ids[:50])
    few = replace(probe, windows=(short[0], cut, short[2]))
    run, seen = torch.nn.Module.__call__, set()

    def watched(module: Any, *arguments: Any, **named: Any) -> Any:
        if type(module).__name__ == "LlamaDecoderLayer":
            seen.add(tuple(arguments[0].shape[:2]))
        return run(module, *arguments, **named)

    monkeypatch.setattr(torch.nn.Module, "__call__", watched)
    here, there = both(root / "fixtures" / "tiny" / "llama", few)
    assert seen == {(1, 95), (1, 49), (2, 95)}
    np.testing.assert_allclose(there.values, here.values, rtol=0, atol=1e-5)
    assert np.abs(there.values - here.values).mean() < 1e-6


def test_at_most_two_layers_are_in_memory(quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that computes, or is being filled, and the next one's tensors."""
    loaded: dict[int, weakref.ref[LoadedTensors]] = {}
    held: list[set[int]] = []
    read = StreamedModel._read_layer

    def watched(model: StreamedModel, index: int) -> LoadedTensors:
        found = read(model, index)
        loaded[index] = weakref.ref(found)
        filled = {i for i, layer in enumerate(model.layers)
                  if not all(p.is_meta for p in layer.parameters())}  # fmt: skip
        held.append(filled | {i for i, tensors in loaded.items() if tensors() is not None})
        return found

    monkeypatch.setattr(StreamedModel, "_read_layer", watched)
    model = StreamedModel(quantized, "float32")
    model.last_hidden(SHORT.windows, quiet)
    assert len(held) == len(model.layers) > 2
    assert max(map(len, held)) <= 2


@pytest.mark.parametrize("error", [BadInput("layer 2 is not there"), OSError("no such disk")])
def test_what_goes_wrong_while_reading_ahead_is_raised(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read = StoredTensors.in_memory

    def failing(self: StoredTensors, modules: list[str], *, pinned: bool) -> Any:
        if "model.layers.2.mlp.down_proj" in modules:
            raise error
        return read(self, modules, pinned=pinned)

    monkeypatch.setattr(StoredTensors, "in_memory", failing)
    with pytest.raises(type(error), match=str(error)):
        reference.measure(quantized, SHORT, dtype="float32", announce=quiet)
    assert readers() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_leaves_no_thread(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        assert readers() != []
        raise error

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", stopped)
    with pytest.raises(error):
        reference.measure(quantized, SHORT, dtype="float32", announce=quiet)
    assert readers() == []


def readers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("read-ahead")]


# Heads, and replay ------------------------------------------------------------------------------


def test_divergence_is_the_cpus() -> None:
    """Every column bit for bit, but for the block that sums go over."""
    base, other, targets = sides(300, 64, 5000, 0.3)
    here = divergence(base, other, targets)
    with made_up_device():
        there_sides = [
            Side(side.hidden, on_device(head_of(side)), side.vocabulary) for side in (base, other)
        ]
        there = divergence(there_sides[0], there_sides[1], targets, DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            divergence(there_sides[0], other, targets, DEVICE)
    np.testing.assert_allclose(there.kld, here.kld, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(there.logprob, here.logprob)
    np.testing.assert_array_equal(there.same_top, here.same_top)


def head_of(side: Side) -> torch.Tensor:
    """Return the weight [V, H] of a linear head."""
    return side.logits(torch.eye(side.hidden.shape[1])).T.contiguous()


def on_device(head: torch.Tensor) -> Any:
    return linear(head.to(DEVICE))


def test_a_checkpoints_head_is_read_onto_the_device(quantized: Path) -> None:
    hidden = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    logits, vocabulary = reference.read_head(quantized)
    with made_up_device():
        there, _ = reference.read_head(quantized, DEVICE)
        found = there(hidden.to(DEVICE)).cpu()
        with pytest.raises(RuntimeError, match="same device"):
            there(hidden)
    assert found.shape == (5, vocabulary)
    assert torch.equal(found, logits(hidden))


@dataclass(frozen=True)
class Seen:
    input: torch.Tensor
    output: torch.Tensor


class MadeUpCapture:
    """An engine that did in float32 what the reference does, on its own windows."""

    windows = (0, 1)
    values = np.zeros(0, np.float32)

    def __init__(self, directory: Path) -> None:
        self._seen: dict[tuple[str, int], Seen] = {}

        def observe(window: int, name: str, rows: torch.Tensor, product: Any) -> torch.Tensor:
            output = product(rows)
            self._seen[name, window] = Seen(rows.clone(), output.clone())
            return torch.as_tensor(output)

        with sdpa_kernel(SDPBackend.MATH):
            StreamedModel(directory, "float32").last_hidden(SHORT.windows, quiet, observe)

    def __contains__(self, name: str) -> bool:
        return True

    def seen(self, name: str, window: int) -> Seen:
        return self._seen[name, window]

    def module_of(self, name: str) -> str:
        return name


def test_a_replay_on_the_device_sees_each_window_and_no_error(root: Path) -> None:
    directory = root / "build" / "tiny-llama-w8a8"
    capture: Any = MadeUpCapture(directory)
    with made_up_device():
        found = replay(directory, SHORT, capture, announce=quiet, device=DEVICE)
    assert {(module.input, module.output) for module in found.modules} == {(0.0, 0.0)}
    assert len(found.modules) == 28


def test_each_device_has_its_own_entry_in_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(directory: Path, probe: Probe, *, dtype: str, device: str, **_: Any) -> Measurement:
        measured.append(device)
        scores = np.zeros(probe.scored, np.float32)
        return Measurement(
            scores, scores.astype(np.int32), Provenance("reference", device, device, dtype)
        )

    monkeypatch.setattr(reference, "measure", measure)
    monkeypatch.setattr(measuring_lab, "choose_device", lambda asked: asked or "cuda")
    monkeypatch.setattr(builds, "arithmetic", lambda device=None: {"isa": str(device)})
    checkpoint = Checkpoint(id="x", source=str(root / "fixtures" / "tiny" / "llama"))
    for device, anew in (("cpu", True), ("cuda", True), ("cpu", False), (None, False)):
        measured.clear()
        own = Lab(lambda *_: SHORT, Ledger(quiet, DiskCache(tmp_path)), reference_device=device)
        found = Case.of(checkpoint, "float32", own).exact
        assert found.provenance.device == (device or "cuda")
        assert measured == ([device] if anew else [])


def test_an_engine_finds_no_head_on_the_gpu(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(
        id="x", source=str(quantized), engine=EngineSettings(enforce_eager=True)
    )
    for device, kept in (("cpu", 1), ("cuda", 0)):
        monkeypatch.setattr(measuring_lab, "choose_device", lambda _, device=device: device)
        own = Lab(lambda *_: SHORT, Ledger(quiet))
        case = Case.of(checkpoint, "float32", own)

        monkeypatch.setattr(measuring_lab, "read_head", lambda *_: (torch.relu, 1))
        own.head(checkpoint.directory)

        def started(*_: Any, own: Lab = own, **__: Any) -> Any:
            raise BadInput(f"{len(own._heads)} heads")

        monkeypatch.setattr(session, "measure", started)
        monkeypatch.setattr(engine, "running_engine", started)
        with pytest.raises(BadInput, match=f"{kept} heads"):
            _ = case.engine
        own.head(checkpoint.directory)
        with pytest.raises(BadInput, match=f"{kept} heads"):
            case.set_otherwise(checkpoint.engine, SHORT)


def test_the_engine_has_gone_when_the_reference_starts(
    quantized: Path, small_probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one GPU, too, neither finds the other's memory taken."""
    events: list[str] = []

    class Served(BadInput):
        pass

    def measure(*_: Any, **__: Any) -> Any:
        events.append("reference")
        raise Served

    start = engine.running_engine

    def running(*arguments: Any, **named: Any) -> Any:
        @contextmanager
        def watched() -> Iterator[Any]:
            events.append("engine starts")
            with start(*arguments, **named) as llm:
                yield llm
            events.append("engine has gone")

        return watched()

    monkeypatch.setattr(engine, "running_engine", running)
    monkeypatch.setattr(reference, "measure", measure)
    own = Lab(lambda *_: small_probe, Ledger(quiet))
    settings = EngineSettings(enforce_eager=True, kernels="portable")
    checkpoint = Checkpoint(id="x", source=str(quantized), engine=settings)
    with pytest.raises(Served):
        _ = Case.of(checkpoint, "float32", own).exact
    assert events == ["engine starts", "engine has gone", "reference"]

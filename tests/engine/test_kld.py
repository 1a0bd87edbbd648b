"""`quantgate kld`: the gate's own divergence, on any text, with the base run once."""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantgate.__main__ import main
from quantgate.commands import kld
from quantgate.commands.kld import Comparison
from quantgate.errors import BadInput
from quantgate.judging.quality import divergence_from_base
from quantgate.judging.stats import paired_mean
from quantgate.measuring import states
from quantgate.measuring.case import Case
from quantgate.measuring.engine import LIVES
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.measuring.states import MANIFEST, Model, States, TextInfo, read_states
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import Probe

pytestmark = pytest.mark.long

Measure = Callable[..., tuple[dict[str, Any], Comparison]]
COLUMNS = ("kld", "logprob", "logprob_base", "same_top", "confidence")


@pytest.fixture(scope="module")
def measure(root: Path) -> Measure:
    """Run the command in this process, as `quantgate kld` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    kld.add_arguments(parser)
    parser.set_defaults(project=root)

    def run(*arguments: object) -> tuple[dict[str, Any], Comparison]:
        return kld.measure(parser.parse_args(list(map(str, arguments))))

    return run


@pytest.fixture(scope="module")
def text(probe: Probe) -> tuple[str, ...]:
    """Options for a short text."""
    words = "\n\n".join(window.text for window in probe.windows[:8])
    return ("--text", words, "--context-length", "64")


@pytest.fixture(scope="module")
def saved(measure: Measure, text: tuple[str, ...], tmp_path_factory: Any) -> Path:
    """The states of the tiny base over the text."""
    into = Path(tmp_path_factory.mktemp("saved") / "base")
    measure("tiny-llama-w4a16", *text, "--save-base", into)
    return into


@pytest.fixture(scope="module")
def compared(measure: Measure, saved: Path) -> tuple[dict[str, Any], Comparison]:
    """The embedded W4A16 checkpoint against the saved base."""
    return measure("tiny-llama-w4a16", "--against", saved)


def test_it_is_the_gates_divergence_to_the_last_digit(
    root: Path, probe: Probe, measure: Measure
) -> None:
    lab = Lab(lambda _task, _quality: probe, Ledger(lambda _: None))
    case = Case.of(read_checkpoint_files(root)["tiny-llama-w4a16"], "serving", lab)
    assert case.base is not None
    expected = case.divergence(
        case.base.for_quality, case.for_quality, case.quality_probe, base_of=case.base
    )
    report, comparison = measure("tiny-llama-w4a16", "--probe", "tiny")
    for name in COLUMNS:
        assert np.array_equal(getattr(comparison.found, name), getattr(expected, name)), name
    figures = divergence_from_base(case).figures
    for name, estimate in report["statistics"].items():
        assert estimate["value"] == figures[name]
        assert estimate["error"] == figures.get(f"± {name}")
    clustered = paired_mean(expected.kld, probe.documents).clustered_error
    assert report["errors_over_documents"]["Mean KLD"] == pytest.approx(clustered, rel=1e-12)
    assert np.array_equal(comparison.positions, probe.positions)


def test_a_saved_base_is_not_run_again(
    measure: Measure, saved: Path, compared: Any, quantized: Path, text: tuple[str, ...]
) -> None:
    """It gives what a run of both gives; naming the text again is allowed."""
    before = len(LIVES)
    _, again = measure("tiny-llama-w4a16", "--against", saved, *text)
    assert [life.directory for life in LIVES[before:]] == [str(quantized)]
    _, both = measure("tiny-llama-w4a16", *text)
    for one in (again, both):
        assert np.array_equal(one.found.kld, compared[1].found.kld)


@pytest.mark.parametrize(
    ("model", "engine"),
    [
        ("build/tiny-llama-w4a16", "vllm"),
        ("fixtures/tiny/llama", "vllm"),
        ("fixtures/tiny/llama", "hf"),
    ],
)
def test_a_model_is_at_no_distance_from_itself(
    measure: Measure, root: Path, model: str, engine: str
) -> None:
    """With the kernels that serve it; run twice, as any two models are."""
    report, comparison = measure(
        root / model, "--base", root / model, "--text", "The committee met. " * 60,
        "--context-length", 64, "--engine", engine, "--enforce-eager",
    )  # fmt: skip
    assert report["scored"] > 100
    assert not comparison.found.kld.any()
    assert report["statistics"]["Mean KLD"] == {"value": 0.0, "error": 0.0}
    assert report["statistics"]["Same top p"]["value"] == 1.0
    assert report["statistics"]["Mean PPL(Q)-PPL(base)"]["value"] == 0.0


def test_hf_gives_the_divergence_of_the_files(
    measure: Measure, compared: tuple[dict[str, Any], Comparison], text: tuple[str, ...]
) -> None:
    """Without vLLM's kernels; rounding differs, and nothing else."""
    before = len(LIVES)
    report, _ = measure("tiny-llama-w4a16", *text, "--engine", "hf")
    assert len(LIVES) == before
    served, mean = (r["statistics"]["Mean KLD"] for r in (compared[0], report))
    assert mean["value"] == pytest.approx(served["value"], abs=3 * served["error"])
    assert mean != served
    assert report["scored"] == compared[0]["scored"]


def test_chunks_change_nothing_but_rounding(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: tuple[str, ...]
) -> None:
    arguments = ("tiny-llama-w4a16", *text, "--dtype", "float32")
    _, whole = measure(*arguments)
    monkeypatch.setattr(states, "MOST_TOKENS", 200)
    _, found = measure(*arguments, "--save-base", tmp_path)
    assert len(read_states(tmp_path).manifest.chunks) > 3
    assert np.abs(found.found.kld - whole.found.kld).max() < 1e-5
    assert np.array_equal(found.documents, whole.documents)
    assert np.array_equal(found.positions, whole.positions)


def _changed(directory: Path, **fields: Any) -> None:
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _flip_a_byte(directory: Path) -> None:
    path = directory / "00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...], str]] = {
    "interrupted": (lambda d: (d / MANIFEST).unlink(), (), "no complete states"),
    "no JSON": (lambda d: (d / MANIFEST).write_text("{"), (), "not a JSON file"),
    "format": (lambda d: _changed(d, format=99), (), "not states of format 1"),
    "field": (lambda d: _changed(d, tokens="many"), (), "Expected `int`, got `str`"),
    "identity": (lambda d: _changed(d, identity="0" * 64), (), "identity sha256:000000000000…"),
    "versions": (
        lambda d: _changed(d, versions=dict(read_states(d).manifest.versions) | {"torch": "1.0"}),
        (),
        "saved with torch 1.0, but this run has",
    ),
    "device": (lambda d: _changed(d, platform="sm90"), (), "saved with device sm90, but this run"),
    "tokenizer": (lambda d: _changed(d, tokenizer="0" * 64), (), "has other tokens than"),
    "bytes": (_flip_a_byte, (), "not the file that was written"),
    "lost": (lambda d: (d / "00000.safetensors").unlink(), (), "00000.safetensors"),
    "dtype": (lambda d: None, ("--dtype", "float32"), "saved with dtype bfloat16, but this run"),
    "engine": (lambda d: None, ("--engine", "hf"), "saved with engine vllm, but this run has hf"),
    "text": (lambda d: None, ("--probe", "tiny"), "which is not probe 'tiny'"),
    "both": (lambda d: None, ("--save-base", "elsewhere"), "--save-base goes with --base"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_states_that_are_not_the_bases_are_refused(
    measure: Measure, saved: Path, tmp_path: Path, damage: str
) -> None:
    damaged = Path(shutil.copytree(saved, tmp_path / "base"))
    spoil, arguments, message = DAMAGES[damage]
    spoil(damaged)
    before = len(LIVES)
    with pytest.raises(BadInput) as error:
        measure("tiny-llama-w4a16", "--against", damaged, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(LIVES) == before


def test_another_base_is_refused(measure: Measure, saved: Path, root: Path, tmp_path: Path) -> None:
    """The files at the base's place are no longer those that were run."""
    copied = Path(shutil.copytree(root / "fixtures/tiny/llama", tmp_path / "llama"))
    damaged = Path(shutil.copytree(saved, tmp_path / "base"))
    _changed(damaged, model=str(copied))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(BadInput, match="saved from a base with identity"):
        measure("tiny-llama-w4a16", "--against", damaged)


def test_an_interrupted_run_leaves_no_manifest(root: Path, probe: Probe, tmp_path: Path) -> None:
    checkpoint = read_checkpoint_files(root)["tiny-llama"]

    def stop(tokens: int) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        states.measure_states(
            Model(checkpoint, "bfloat16"), probe.windows, TextInfo("a", "b"), tmp_path, stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["00000.safetensors"]
    with pytest.raises(BadInput, match="no complete states"):
        read_states(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build/tiny-llama-w4a16", "--text", "a b"], "no base is named"),
        (["tiny-llama-w4a16", "--picture", "x.png"], "pictures are SVG; name it FILE.svg"),
        (["tiny-llama-w4a16", "--text-file", "nowhere"], "--text-file nowhere: no such file"),
        (["tiny-llama-w4a16", "--probe", "nowhere"], "nowhere.jsonl: no such probe"),
        (["tiny-llama-w4a16", "--text", "a"], "no token to score by protocol llama.cpp"),
        (["tiny-ner-bert-w4a16", "--text", "a"], "does 'token_classify', not 'generate'"),
        (["tiny-llama-w4a16", "--base", "x/y"], "says what tiny-llama-w4a16's base is"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["kld", *arguments, "--project", str(root)]) == 4
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said


def test_saved_states_are_not_overwritten(measure: Measure, saved: Path) -> None:
    with pytest.raises(BadInput, match="holds saved states already; use them with --against"):
        measure("tiny-llama-w4a16", "--probe", "tiny", "--save-base", saved)


def test_a_distribution_that_is_not_finite_is_no_figure(
    saved: Path, tmp_path: Path, root: Path
) -> None:
    base = read_states(saved)
    broken = Path(shutil.copytree(saved, tmp_path / "broken"))
    (chunk,) = base.chunks()
    chunk.hidden[7] = np.nan
    file = states._write_chunk(broken, 0, chunk)
    manifest = dataclasses.replace(base.manifest, chunks=(file,))
    model = Model(read_checkpoint_files(root)["tiny-llama"], "bfloat16")
    with pytest.raises(BadInput, match=r"1 of \d+ distributions are not finite"):
        kld.compare(base, model, States(broken, manifest), model)

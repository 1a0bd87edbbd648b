"""Ten faults with ten causes in a real model's W4A16: each is caught, and its place is named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import REAL
from preloaded import run_python
from safetensors.torch import load_file, save_file

from architecture_runs import in_engines
from quantgate.judging import audited, fidelity
from quantgate.judging.verdict import Verdict
from quantgate.measuring.case import Case
from quantgate.measuring.lab import Lab
from quantgate.measuring.ledger import Ledger
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.probe import stored_probe

NAME = "smollm2-w4a16"
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / REAL / NAME).is_dir(), reason="build/real is not made: tools/make_real.py"
    ),
    pytest.mark.slow(reason="serves a model of 135 million parameters seven times"),
]


@pytest.fixture(scope="module")
def clean() -> Checkpoint:
    return read_checkpoint_files(ROOT, "real")[NAME]


@pytest.fixture
def copied(clean: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy to damage; its weights are linked until they are written."""
    directory = tmp_path / NAME
    shutil.copytree(clean.directory, directory, copy_function=os.link)
    return dataclasses.replace(clean, source=str(directory), revision=None, golden=False)


def case(checkpoint: Checkpoint, dtype: str = "float32") -> Case:
    lab = Lab(stored_probe, Ledger(lambda _: None), tier="quick")
    return Case.of(checkpoint, dtype, lab)


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a copy's tensors, and leave the original's as they are."""
    path = checkpoint.directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def edit(checkpoint: Checkpoint, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    path = checkpoint.directory / name
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content))


def assert_fails(verdict: Verdict, *said: str) -> None:
    message = verdict.message(NAME)
    assert verdict.outcome == "fail", message
    for text in said:
        assert text in message, message


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors[name].mul_(factor)


def exchanged(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for part in ("weight_packed", "weight_scale"):
            a, b = f"{one}.{part}", f"{other}.{part}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    return change


def shifted_groups(name: str) -> Callable[[dict[str, Any]], None]:
    """Each group gets its neighbour's scale, as an exporter that is off by one writes it."""

    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].roll(1, dims=1)

    return change


def reversed_nibbles(name: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        words = tensors[name].numpy().view(np.uint32)
        turned = np.zeros_like(words)
        for i in range(8):
            turned |= ((words >> np.uint32(4 * i)) & np.uint32(15)) << np.uint32(4 * (7 - i))
        tensors[name].copy_(type(tensors[name])(turned.view(np.int32)))

    return change


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (
            scaled("model.layers.7.self_attn.k_proj.weight_scale", 1.02),
            "model.layers.7.self_attn.k_proj",
        ),
        (
            exchanged("model.layers.12.mlp.gate_proj", "model.layers.12.mlp.up_proj"),
            "model.layers.12.mlp.",
        ),
        (scaled("model.norm.weight", 1.01), "model.norm.weight"),
        (
            shifted_groups("model.layers.21.mlp.down_proj.weight_scale"),
            "model.layers.21.mlp.down_proj",
        ),
        (
            reversed_nibbles("model.layers.3.self_attn.o_proj.weight_packed"),
            "model.layers.3.self_attn.o_proj",
        ),
    ],
    ids=["scale", "gate and up", "final norm", "scales shifted", "nibbles reversed"],
)
def test_a_fault_in_the_weights_is_named(
    copied: Checkpoint, change: Callable[[dict[str, Any]], None], place: str
) -> None:
    rewrite(copied, change)
    assert_fails(audited.weights(copied), place)


def test_a_fault_in_the_config_or_the_tokenizer_is_named(copied: Checkpoint) -> None:
    edit(copied, "config.json", lambda c: c["rope_parameters"].update(rope_theta=10000.0))
    assert_fails(audited.files(copied), "rope_theta")


def test_exchanged_tokens_are_named(copied: Checkpoint) -> None:
    def exchange(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        a, b = list(vocabulary)[1000:1002]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    edit(copied, "tokenizer.json", exchange)
    assert_fails(audited.files(copied), "vocab: ")


def output_off(name: str) -> Callable[[Any], None]:
    """One linear's outputs are 2 % too large."""

    def change(model: Any) -> None:
        model.get_submodule(name).register_forward_hook(
            lambda _, __, out: (out[0] * 1.02, *out[1:])
        )

    return change


def norm_off(name: str) -> Callable[[Any], None]:
    return lambda model: model.get_submodule(name).weight.data.mul_(1.01)


def one_row_zero(name: str) -> Callable[[Any], None]:
    """A kernel that leaves out the last row of each output tile."""

    def change(model: Any) -> None:
        def zero(_: Any, __: Any, out: Any) -> Any:
            found = out[0].clone()
            found[:, -1] = 0
            return (found, *out[1:])

        model.get_submodule(name).register_forward_hook(zero)

    return change


@pytest.mark.parametrize(
    ("change", "places"),
    [
        (output_off("model.layers.5.mlp.down_proj"), ["model.layers.5.mlp.down_proj"]),
        (one_row_zero("model.layers.28.self_attn.o_proj"), ["model.layers.28.self_attn.o_proj"]),
        # What feeds the linears is wrong, and their own products are right.
        (
            norm_off("model.layers.17.post_attention_layernorm"),
            ["model.layers.17.mlp.gate_proj", "its product is right, what feeds it is not"],
        ),
    ],
    ids=["an output", "a row", "a norm"],
)
def test_a_fault_in_the_engine_is_named(
    clean: Checkpoint, change: Callable[[Any], None], places: list[str]
) -> None:
    with in_engines(change):
        # Without its base, whose engine would have the same fault: that is the environment's.
        verdict = fidelity.replay(case(dataclasses.replace(clean, golden=False, base=None)))
    assert_fails(verdict, "ENGINE", *places)


@pytest.mark.parametrize("name", sorted(read_checkpoint_files(ROOT, "real")))
def test_a_real_checkpoint_gives_no_false_error(name: str) -> None:
    real = read_checkpoint_files(ROOT, "real")[name]
    for judge in (audited.files, audited.weights):
        verdict = judge(real)
        assert verdict.outcome == "pass", verdict.message(name)


def test_the_readmes_example_prints_what_it_shows(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text.partition("A real one, step by step")[2].partition("| exit status |")[0]
    commands = re.findall(r"^    (quantgate .*)$", part, re.MULTILINE)
    audited_as, gated_as = re.findall(r"```\n(.*?)```", part, re.DOTALL)
    audit, gate = (shlex.split(command)[1:] for command in commands)
    ran = run_python("-m", "quantgate", *audit, cwd=ROOT)
    assert (ran.returncode, ran.stdout) == (0, audited_as)
    ran = run_python("-m", "quantgate", *gate, "--report", str(tmp_path), cwd=ROOT)
    assert ran.returncode == 1, ran.stdout[-3000:]
    columns = slice(2, 4)  # the check and its verdict: figures differ between processors
    shown = [row.split()[columns] for row in gated_as.splitlines()[1:]]
    rows = [line.split()[columns] for line in ran.stdout.splitlines() if line.startswith(NAME)]
    assert rows == shown

"""The audit as checks: faults that engine and reference would read alike, found in the files."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from quantgate.judging import audited
from quantgate.judging.changed_files import change_since
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import digests, identity

NAME = "tiny-llama-w4a16"


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Checkpoint:
    """A copy to damage, with its base."""
    directory = shutil.copytree(root / "build" / NAME, tmp_path / NAME)
    known = read_checkpoint_files(root)[NAME]
    return dataclasses.replace(known, source=str(directory), revision=None)


def test_a_clean_checkpoint_passes_both(copied: Checkpoint) -> None:
    for judge in (audited.files, audited.weights):
        verdict = judge(copied)
        assert verdict.outcome == "pass", verdict.message(NAME)
        assert verdict.next_step == ""


def test_another_rope_theta_than_the_bases_is_named(copied: Checkpoint) -> None:
    path = copied.directory / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] *= 1.1
    path.write_text(json.dumps(config))
    verdict = audited.files(copied)
    assert verdict.outcome == "fail"
    assert "rope_theta" in verdict.detail
    assert verdict.attribution.startswith("CHECKPOINT: ")
    assert verdict.findings[0].severity == "error"
    assert f"quantgate audit {copied.source} --base" in verdict.next_step
    assert audited.weights(copied).outcome == "pass"


def test_a_norm_that_is_one_percent_larger_is_named(copied: Checkpoint) -> None:
    path = copied.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, path, {"format": "pt"})
    verdict = audited.weights(copied)
    assert verdict.outcome == "fail"
    assert "model.norm.weight" in verdict.detail
    assert audited.files(copied).outcome == "pass"


def test_one_scale_of_a_layer_is_named(copied: Checkpoint) -> None:
    path = copied.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= 1.02
    save_file(tensors, path, {"format": "pt"})
    verdict = audited.weights(copied)
    assert verdict.outcome == "fail"
    assert "model.layers.1.mlp.down_proj" in verdict.detail


APPROVE = 'python tools/regen_golden.py --checkpoint x --reason "…"'


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def do(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))

    return do


def permute(tokenizer: dict[str, Any]) -> None:
    ids = tokenizer["model"]["vocab"]
    one, other = list(ids)[300:302]
    ids[one], ids[other] = ids[other], ids[one]


def exchange_special_tokens(tokenizer: dict[str, Any]) -> None:
    one, other = tokenizer["added_tokens"][:2]
    one["content"], other["content"] = other["content"], one["content"]


IN_FILES = [
    ("generation_config.json", "eos_token_id", lambda said: said.update(eos_token_id=5)),
    ("generation_config.json", "temperature", lambda said: said.update(temperature=0.1)),
    ("config.json", "rms_norm_eps", lambda said: said.update(rms_norm_eps=1e-6)),
    ("config.json", "rope", lambda said: said.update(rope_parameters=None)),
    ("tokenizer.json", "vocab", permute),
    ("tokenizer.json", "<|bos|>", exchange_special_tokens),
    ("tokenizer.json", "pre_tokenizer", lambda said: said.update(pre_tokenizer=None)),
    ("tokenizer.json", "ignore_merges", lambda said: said["model"].update(ignore_merges=True)),
    ("tokenizer_config.json", "chat_template", lambda said: said.update(chat_template="{{ m }}")),
]


@pytest.mark.parametrize(("file", "key", "change"), IN_FILES, ids=[key for _, key, _ in IN_FILES])
@pytest.mark.parametrize("recorded", [True, False])
def test_no_change_that_the_audit_finds_is_offered_for_approval(
    copied: Checkpoint,
    file: str,
    key: str,
    change: Callable[[dict[str, Any]], object],
    recorded: bool,
) -> None:
    """By path it fails, and names the key; with a golden, too, and approval is no next step."""
    before, approved = identity(copied.directory), digests(copied.directory)
    edit(file, change)(copied.directory)
    verdict = audited.files(copied)
    assert verdict.outcome == "fail"
    assert key in verdict.message(NAME)
    assert identity(copied.directory) != before
    said = change_since(copied, approved if recorded else {}, APPROVE)
    assert (f"changed: {file}" in said.detail) is recorded
    assert key in said.detail
    assert "regen_golden" not in said.next_step
    assert f"quantgate audit {copied.source} --base" in said.next_step


def test_other_weights_may_be_approved(copied: Checkpoint) -> None:
    """Those that are a quantization of the base's weights as much as the approved ones were."""
    approved = digests(copied.directory)
    scale_of_down_proj(copied, 1.002)
    said = change_since(copied, approved, APPROVE)
    assert (said.detail, said.next_step) == ("changed: model.safetensors", APPROVE)
    unrecorded = change_since(copied, {}, APPROVE)
    assert unrecorded.detail == ""
    assert unrecorded.next_step.endswith(f"finds nothing wrong with its files; {APPROVE}")
    assert "regen_golden" not in change_since(copied, {}, "").next_step
    alone = dataclasses.replace(copied, base=None)
    assert change_since(alone, approved, APPROVE).next_step == APPROVE
    assert "regen_golden" not in change_since(alone, {}, APPROVE).next_step


def test_a_generation_config_that_repeats_the_config_is_no_part_of_the_identity(
    copied: Checkpoint,
) -> None:
    """Nor one that is absent: vLLM reads the same ids from config.json."""
    before = identity(copied.directory)
    (copied.directory / "generation_config.json").unlink()
    assert identity(copied.directory) == before
    (copied.directory / "generation_config.json").write_text("[")
    assert identity(copied.directory) != before


def test_weights_that_are_not_the_bases_are_not_offered_for_approval(copied: Checkpoint) -> None:
    approved = digests(copied.directory)
    scale_of_down_proj(copied, 1.02)
    said = change_since(copied, approved, APPROVE)
    assert said.detail.startswith(
        "changed: model.safetensors; the audit says of it: model.layers.1"
    )
    assert "regen_golden" not in said.next_step


def scale_of_down_proj(checkpoint: Checkpoint, factor: float) -> None:
    path = checkpoint.directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale"] *= factor
    save_file(tensors, path, {"format": "pt"})

"""The audit as checks: faults that engine and reference would read alike, found in the files."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantgate.judging import audited
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files

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
    assert f"python -m quantgate audit {copied.source} --base" in verdict.next_step
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

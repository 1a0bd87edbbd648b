"""Each rule of the audit finds a checkpoint that breaks it, by name, and no clean one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from audit_damages import ACTORDER, DAMAGES, FP8, NVFP4, ROOT, W4A16, Damage
from audit_damages_beside_base import DAMAGES_BESIDE_BASE
from audit_damages_modelopt import DAMAGES_OF_MODELOPT, as_modelopt
from raw_checkpoint import RawCheckpoint

from quantgate.audit import configs
from quantgate.audit.finding import Finding
from quantgate.audit.rules import RULES, audit
from quantgate.subject.checkpoint_file import read_checkpoint_files

EVERY = (*DAMAGES, *DAMAGES_BESIDE_BASE, *DAMAGES_OF_MODELOPT)


def base_of(checkpoint: str) -> Path:
    kind = "ner-qwen2" if "ner" in checkpoint else checkpoint.split("-")[1]
    return ROOT / "fixtures" / "tiny" / kind


def found(checkpoint: Path, base: Path | None, rule: str, *, deep: bool) -> list[Finding]:
    return [finding for finding in audit(checkpoint, base, deep=deep) if finding.rule == rule]


@pytest.mark.parametrize("damage", EVERY, ids=lambda damage: f"{damage.rule}-{damage.name}")
def test_a_damaged_checkpoint_breaks_the_rule(damage: Damage, tmp_path: Path) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / damage.checkpoint, tmp_path / "damaged")
    damage.do(checkpoint)
    checkpoint.write()
    needs = next(rule.needs for rule in RULES if rule.id == damage.rule)
    base = None if needs == "files" else base_of(damage.checkpoint)
    findings = found(checkpoint.directory, base, damage.rule, deep=needs == "weights")
    assert any(damage.name in finding.name for finding in findings), findings


def test_each_rule_is_broken_by_one() -> None:
    """Those that a file of bytes breaks have tests of their own."""
    own = {"shard-header", "shard-gap", "base-unreadable", "rope-spelling"}
    assert {damage.rule for damage in EVERY} | own == {rule.id for rule in RULES}


def test_files_that_are_cut_or_have_too_much(tmp_path: Path) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / W4A16, tmp_path / "damaged")
    path = checkpoint.directory / "model.safetensors"
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b"more")
    (gap,) = found(checkpoint.directory, None, "shard-gap", deep=False)
    assert (gap.name, gap.file) == ("model.safetensors", "model.safetensors")
    with path.open("r+b") as stream:
        stream.truncate(size - 10)
    findings = found(checkpoint.directory, None, "shard-header", deep=False)
    assert any("truncated" in finding.value for finding in findings)


@pytest.mark.parametrize("length", [10**18, 2**63, 1, 0])
def test_a_header_that_claims_any_length(length: int, tmp_path: Path) -> None:
    """Nothing is allocated by it: a finding in one sentence."""
    (directory := tmp_path / "checkpoint").mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":')
    (header,) = found(directory, None, "shard-header", deep=False)
    assert header.name == "model.safetensors"


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        assert {finding.rule for finding in audit(path, None)} == {"unreadable"}
    base = found(ROOT / "build" / W4A16, tmp_path, "base-unreadable", deep=False)
    assert next(finding.name for finding in base) == "base: config.json"


def test_rope_that_an_older_transformers_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    directory = ROOT / "build" / W4A16
    assert not found(directory, None, "rope-spelling", deep=False)
    monkeypatch.setattr(configs, "_installed", lambda _package: "4.57.1")
    (rope,) = found(directory, None, "rope-spelling", deep=False)
    assert rope.name == "rope_theta"


def clean() -> dict[str, tuple[Path, Path | None]]:
    """Every checkpoint that is embedded, with its base."""
    files = read_checkpoint_files(ROOT).values()
    paths = {f.source: (ROOT / f.source, ROOT / f.base if f.base else None) for f in files}
    return paths | {ACTORDER: (ROOT / "build" / ACTORDER, base_of(ACTORDER))}


@pytest.mark.parametrize("source", sorted(clean()))
def test_a_clean_checkpoint_breaks_no_rule(source: str) -> None:
    """With its base and without: notes alone."""
    path, base = clean()[source]
    for findings in (audit(path, None), audit(path, base, deep=True) if base else ()):
        assert [finding for finding in findings if finding.severity != "note"] == []


def test_notes_are_of_quantized_checkpoints_alone() -> None:
    assert audit(ROOT / "fixtures" / "tiny" / "llama", None) == ()


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        "import sys; from quantgate.__main__ import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'vllm', 'transformers', 'compressed_tensors'} & sys.modules.keys(); "
        "sys.exit(f'{heavy}' if heavy else status)"
    )
    base = str(ROOT / "fixtures" / "tiny" / "llama")
    command = [sys.executable, "-c", code, "audit", str(ROOT / "build" / W4A16), "--base", base]
    done = subprocess.run([*command, "--deep"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_weights_that_are_there_twice_for_another_library(tmp_path: Path) -> None:
    """Mistral's repositories hold `consolidated.safetensors` beside the files that are loaded."""
    shutil.copytree(ROOT / "build" / W4A16, tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    shutil.copyfile(weights, weights.with_name("consolidated.safetensors"))
    assert {finding.severity for finding in audit(tmp_path / "checkpoint", None)} == {"note"}


@pytest.mark.parametrize(
    "said", [{"quant_method": "mxfp4"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}]
)
def test_other_methods_are_not_held_to_compressed_tensors(
    said: dict[str, object], tmp_path: Path
) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / NVFP4, tmp_path / "other")
    checkpoint.config(quantization_config=said)
    checkpoint.rename(
        "model.layers.0.mlp.up_proj.weight_packed", "model.layers.0.mlp.up_proj_blocks"
    )
    checkpoint.tensors = {n: t for n, t in checkpoint.tensors.items() if "weight_" not in n}
    checkpoint.write()
    errors = {f.rule for f in audit(checkpoint.directory, None) if f.severity == "error"}
    assert errors <= {"layer-uneven"}  # most of its linears were left out


@pytest.mark.parametrize("source", [NVFP4, FP8])
def test_what_model_optimizer_writes_breaks_no_rule(source: str, tmp_path: Path) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / source, tmp_path / "modelopt")
    as_modelopt(checkpoint)
    checkpoint.write()
    findings = audit(checkpoint.directory, base_of(source))
    assert [str(f) for f in findings if f.severity != "note"] == []
    (counts,) = [f for f in findings if f.rule == "precision-counts"]
    assert "28 " in counts.value


def test_a_format_without_a_layout_is_a_warning(tmp_path: Path) -> None:
    checkpoint = RawCheckpoint(ROOT / "build" / W4A16, tmp_path / "sparse")
    checkpoint.group(format="marlin-24")
    checkpoint.rename("model.layers.0.mlp.up_proj.weight_shape", "model.layers.0.mlp.up_proj.meta")
    checkpoint.write()
    findings = audit(checkpoint.directory, None)
    assert [f.rule for f in findings if f.severity != "note"] == ["format-unknown"]


def test_a_hub_cache_s_links_lead_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    shutil.copytree(ROOT / "build" / W4A16, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert not found(snapshot, None, "symlink-outside", deep=False)

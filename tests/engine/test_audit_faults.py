"""Faults that engine and reference read alike fail a gate by path, and the tensor or key is named.

Most were once missed; `audit` and `audit-weights` are the checks that a gate with `--base` runs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from audit_damages import ROOT, W4A16
from audit_faults import IN_FILES, IN_WEIGHTS, ROPE, Fault
from raw_checkpoint import RawCheckpoint

from quantgate.judging import audited
from quantgate.judging.changed_files import change_since
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_checkpoint_files
from quantgate.subject.files import digests, identity

APPROVE = 'quantgate approve --checkpoint x --reason "…"'


@pytest.fixture
def faulty(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Checkpoint, Mapping[str, str]]:
    """A checkpoint with a fault, beside its base, and the digests of its files before."""
    fault: Fault = request.param
    known = read_checkpoint_files(ROOT).get(fault.checkpoint) or read_checkpoint_files(ROOT)[W4A16]
    base = shutil.copytree(ROOT / str(known.base), tmp_path / "base")
    checkpoint = RawCheckpoint(ROOT / "build" / fault.checkpoint, tmp_path / fault.checkpoint)
    for directory in (base, checkpoint.directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fault.both))
    before = digests(checkpoint.directory)
    fault.do(checkpoint)
    checkpoint.write()
    source = str(checkpoint.directory)
    return dataclasses.replace(known, source=source, base=str(base), revision=None), before


def by_fault(faults: tuple[Fault, ...]) -> Callable[[Any], Any]:
    cases = [pytest.param(fault, fault, id=fault.id) for fault in faults]
    return pytest.mark.parametrize(("faulty", "fault"), cases, indirect=["faulty"])


@by_fault(IN_FILES)
def test_a_fault_in_the_files_fails_and_is_named(
    faulty: tuple[Checkpoint, Mapping[str, str]], fault: Fault
) -> None:
    """With a golden, too, and no message proposes to approve it."""
    checkpoint, approved = faulty
    verdict = audited.files(checkpoint)
    assert verdict.outcome == "fail"
    assert any(fault.named in str(one) for one in verdict.findings if one.severity == "error")
    change = change_since(checkpoint, approved, APPROVE)
    assert "the audit says of it: " in change.detail
    for step in (verdict.next_step, change.next_step):
        assert f"quantgate audit {checkpoint.source} --base" in step
        assert APPROVE not in step


@by_fault(IN_WEIGHTS)
def test_a_fault_in_the_weights_fails_and_is_named(
    faulty: tuple[Checkpoint, Mapping[str, str]], fault: Fault
) -> None:
    checkpoint, approved = faulty
    verdict = audited.weights(checkpoint)
    assert verdict.outcome == "fail"
    assert any(fault.named in str(one) for one in verdict.findings if one.severity == "error")
    change = change_since(checkpoint, approved, APPROVE)
    assert "model.safetensors" in change.detail
    assert APPROVE not in change.next_step
    assert identity(checkpoint.directory) != identity(ROOT / "build" / fault.checkpoint)


@pytest.mark.parametrize("source", sorted({fault.checkpoint for fault in IN_FILES + IN_WEIGHTS}))
@pytest.mark.parametrize("both", [{}, {"rope_parameters": ROPE}], ids=["as it is", "scaled rope"])
def test_what_the_faults_begin_with_is_clean(
    source: str, both: dict[str, Any], tmp_path: Path
) -> None:
    known = read_checkpoint_files(ROOT).get(source) or read_checkpoint_files(ROOT)[W4A16]
    own, base = tmp_path / "own", tmp_path / "base"
    shutil.copytree(ROOT / "build" / source, own)
    shutil.copytree(ROOT / str(known.base), base)
    for directory in (own, base):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | both))
    clean = dataclasses.replace(known, source=str(own), base=str(base), revision=None)
    for judge in (audited.files, audited.weights):
        assert judge(clean).outcome == "pass"

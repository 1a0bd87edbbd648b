"""`python -m quantgate audit`: what it prints, how it exits, and what docs/audit.md says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from audit_damages import ROOT, W4A16
from large_checkpoint import SHAPES, write_large
from raw_checkpoint import RawCheckpoint

from quantgate.__main__ import main
from quantgate.audit.rules import RULES

BASE = ROOT / "fixtures" / "tiny" / "llama"
DOCS = ROOT / "docs" / "audit.md"
# What the docs say of a checkpoint that needs more than its path.
NEEDS = {"PATH": "files", "`--base`": "base", "`--deep`": "weights"}
HOSTILE = "re:\x1b[31mred\u202e[bold]\n"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A checkpoint with a lost norm, a changed rope and hostile text in its config."""
    checkpoint = RawCheckpoint(ROOT / "build" / W4A16, tmp_path / "damaged")
    checkpoint.drop("model.layers.1.input_layernorm.weight")
    checkpoint.config(rope_parameters={"rope_theta": 11000.0, "rope_type": "default"})
    checkpoint.quantization(ignore=["lm_head", HOSTILE])
    checkpoint.write()
    return checkpoint.directory


def test_the_table(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(damaged), "--base", str(BASE)]) == 1
    printed = capsys.readouterr().out
    assert "ERROR layer-uneven: " in printed
    assert (
        "  model.layers.1.input_layernorm: is missing; 3 of 4 layers have it; expected" in printed
    )
    assert "rope.rope_theta: 11000.0; expected 10000.0, the base's" in printed
    assert all(line.isprintable() for line in printed.splitlines())
    assert re.search(r"^\d errors, 0 warnings, \d notes$", printed, re.MULTILINE)
    assert main(["audit", str(ROOT / "build" / W4A16), "--base", str(BASE), "--deep"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"mlp\.down_proj +▁▁▁▁  largest 0\.0", printed)


def test_json_and_sarif(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sarif = tmp_path / "found.sarif"
    assert main(["audit", str(damaged), "--base", str(BASE), "--json", "--sarif", str(sarif)]) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    (rope,) = [finding for finding in findings if finding["rule"] == "config-differs"]
    assert rope.keys() == {
        *("rule", "severity", "name", "value", "expected", "file", "why", "seen")
    }
    assert (rope["name"], rope["file"]) == ("rope.rope_theta", "config.json")
    (run,) = json.loads(sarif.read_text())["runs"]
    rules = {rule["id"]: rule for rule in run["tool"]["driver"]["rules"]}
    assert rules.keys() == {rule.id for rule in RULES}
    assert len(run["results"]) == len(findings)
    for result in run["results"]:
        assert result["ruleId"] in rules
        assert result["level"] in ("error", "warning", "note")
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"]


def test_rules_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "--rules"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [rule.id for rule in RULES]
    for rule in RULES:
        assert main(["audit", "--explain", rule.id]) == 0
        told = " ".join(capsys.readouterr().out.split())
        assert rule.why in told
        assert rule.seen in told


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--explain", "nothing"], "no rule 'nothing'"),
        ([], "needs a checkpoint's directory"),
        (["build/tiny-llama-w4a16", "--deep"], "give --base"),
    ],
)
def test_a_command_line_that_cannot_be_used(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *arguments]) == 4
    assert reason in capsys.readouterr().err


def tables() -> list[list[list[str]]]:
    """Return the tables of the docs' last two sections, without their heads."""
    _, _, text = DOCS.read_text().partition("## Rules")
    found = re.findall(r"\|---.*\n((?:\|.*\n)+)", text)
    return [
        [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
        for table in found
    ]


def test_the_docs_list_every_rule() -> None:
    rules, _ = tables()
    told = [(row[0].strip("`"), row[1], NEEDS[row[2]], row[3], row[4]) for row in rules]
    assert told == [(rule.id, rule.severity, rule.needs, rule.why, rule.seen) for rule in RULES]
    assert f"{len(RULES)} of them." in DOCS.read_text()


def test_the_docs_map_rules_to_historical_bugs() -> None:
    _, bugs = tables()
    named = {rule for row in bugs for rule in re.findall(r"`([a-z0-9-]+)`", row[3])}
    assert named <= {rule.id for rule in RULES}
    assert all("`" in row[3] for row in bugs)
    assert len({row[0] for row in bugs}) >= 18


def peak_memory(checkpoint: Path) -> float:
    """Return the most memory that an audit holds, in MB.

    Its own peak from Linux: a child's `ru_maxrss` begins with that of the process that started it.
    """
    code = (
        "import re, sys; from quantgate.__main__ import main; "
        "status = main(['audit', sys.argv[1], '--json']); "
        "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1], "
        "file=sys.stderr); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stderr) / 1000


def test_an_8b_checkpoint_needs_little_memory(tmp_path: Path) -> None:
    write_large(tmp_path, SHAPES["8B"])
    assert peak_memory(tmp_path) < 200


@pytest.mark.slow(reason="writes 1.1 GB of scales")
def test_a_70b_checkpoint_needs_little_memory(tmp_path: Path) -> None:
    write_large(tmp_path, SHAPES["70B"])
    assert peak_memory(tmp_path) < 500

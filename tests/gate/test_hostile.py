"""A checkpoint whose every string is hostile goes through the whole gate, and harms nothing."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import RunGate
from pages import CHROMIUM, browse, elements
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.long, pytest.mark.slow(reason="a gate run for each hostile checkpoint")]

SCRIPT = "<script>document.title='owned';console.log('owned')</script>"
ESCAPES = "\x1b]0;owned\x07\x1b[31m\u202e\x00"
MARKDOWN = "\n## owned | a | `` ```\n[x](http://evil.example)"
TEMPLATE = "{{ 7 * 7 }}{% raw %}${{ github.token }}::error::owned"
HOSTILE = f"../../../etc/passwd{SCRIPT}{ESCAPES}{MARKDOWN}{TEMPLATE}"
MEGABYTE = HOSTILE + "<b>A</b>" * 130_000
NAME = SCRIPT.replace("/", "") + "\x1b[31m" + "\u202e'\";$(touch owned) ..\n" + "A" * 100
FIDELITY, REPLAY = "fidelity and float32", "replay and float32"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.fixture
def hostile(quantized: Path, tmp_path: Path) -> Path:
    """A checkpoint that loads, and says something hostile wherever it can say anything."""
    directory = Path(shutil.copytree(quantized, tmp_path / NAME))
    config = json.loads((directory / "config.json").read_text())
    scheme = config["quantization_config"]
    scheme["config_groups"] = dict(zip([HOSTILE], scheme["config_groups"].values(), strict=True))
    scheme["ignore"] += [MEGABYTE]
    scheme["version"] = HOSTILE
    edit_json(directory / "config.json", quantization_config=scheme, _name_or_path=MEGABYTE)
    # Ids are as ever; every "z" of what they stand for is a megabyte, every "e" not much better.
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    replacements = [
        {"type": "Replace", "pattern": {"String": letter}, "content": text}
        for letter, text in (("z", MEGABYTE), ("e", HOSTILE))
    ]
    decoder = {"type": "Sequence", "decoders": [tokenizer["decoder"], *replacements]}
    edit_json(directory / "tokenizer.json", decoder=decoder)
    edit_json(directory / "tokenizer_config.json", name_or_path=HOSTILE, chat_template=HOSTILE)
    return directory


def run(run_gate: RunGate, check: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    return run_gate("suites", "-k", check, "--checkpoint", directory, "--gate-report", "report")


def assert_harmless(run_gate: RunGate, output: str) -> None:
    """Reports and terminal hold no control character, no element, no row and no size of theirs."""
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", output)
    assert "\n::error" not in output
    assert len(output) < 100_000
    report = run_gate.project / "report"
    assert sorted(path.name for path in report.iterdir()) == [
        "gate.json", "gate.md", "index.html", "junit.xml",
    ]  # fmt: skip
    for path in report.iterdir():
        text = path.read_text()
        assert path.stat().st_size < 300_000, path.name
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", text), path.name
    found = elements((report / "index.html").read_text())
    assert "script" not in found.tags
    assert "b" not in found.tags
    assert all(load.startswith(("href=#", "href=data:,")) for load in found.loads)
    comment = (report / "gate.md").read_text()
    assert "<script" not in re.sub(r"^    .*$", "", comment, flags=re.MULTILINE)
    assert not re.search(r"^#+ owned|^::error", comment, re.MULTILINE)
    assert not any(path.name == "owned" for path in run_gate.project.rglob("owned"))


def test_a_hostile_checkpoint_is_judged_like_any_other(
    run_gate: RunGate, hostile: Path, tmp_path: Path
) -> None:
    done = run(run_gate, FIDELITY, hostile)
    assert done.returncode == 0, done.stdout[-3000:]
    assert_harmless(run_gate, done.stdout + done.stderr)
    (checkpoint,) = run_gate.report["checkpoints"]
    assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", checkpoint["id"])
    page = run_gate.project / "report" / "index.html"
    assert "etc/passwd&lt;script&gt;" in page.read_text()  # its worst tokens, in their text
    if CHROMIUM is None:
        pytest.skip("not run: no chromium here, apt-get install chromium")
    shown = browse(page, tmp_path)
    assert "CONSOLE" not in shown.stderr
    assert "<title>Quantgate: PASS</title>" in shown.stdout


def test_a_tensor_with_a_hostile_name_is_not_run(run_gate: RunGate, hostile: Path) -> None:
    weights = load_file(hostile / "model.safetensors")
    extra = {f"model.layers.0.{HOSTILE}.weight": weights["model.norm.weight"].clone(),
             MEGABYTE: weights["model.norm.weight"].clone()}  # fmt: skip
    save_file({**weights, **extra}, hostile / "model.safetensors", {HOSTILE: HOSTILE})
    done = run(run_gate, REPLAY, hostile)
    assert done.returncode == 1, done.stdout[-3000:]
    assert_harmless(run_gate, done.stdout + done.stderr)


@pytest.mark.parametrize(
    "change",
    [
        {"format": MEGABYTE},
        {"quant_method": HOSTILE},
        {"config_groups": {HOSTILE: {"weights": {"type": HOSTILE, "num_bits": HOSTILE}}}},
        {"config_groups": {HOSTILE: MEGABYTE}},
        {"config_groups": [HOSTILE]},
        {"kv_cache_scheme": {"type": MEGABYTE}},
    ],
    ids=["format", "method", "bits", "group", "groups", "cache"],
)
def test_a_hostile_config_is_refused_or_read_over(
    run_gate: RunGate, hostile: Path, change: dict[str, Any]
) -> None:
    config = json.loads((hostile / "config.json").read_text())
    scheme = {**config["quantization_config"], **change}
    edit_json(hostile / "config.json", quantization_config=scheme)
    done = run(run_gate, REPLAY, hostile)
    assert done.returncode in (0, 1, 4), done.stdout[-3000:]
    output = done.stdout + done.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", output)
    assert len(output) < 100_000
    assert "Traceback" not in output

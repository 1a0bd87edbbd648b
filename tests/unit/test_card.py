"""`quantgate card`: recoveries with ±, metadata that the hub's own library reads, and a badge."""

import doctest
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from huggingface_hub import ModelCard

from quantgate.__main__ import main
from quantgate.judging.results import CheckResult
from quantgate.judging.verdict import Deviation, Verdict
from quantgate.reporting import card
from quantgate.reporting.badge import badge
from quantgate.reporting.gate_json import gate_json
from quantgate.reporting.run import Run
from quantgate.subject.probe import ScoredProbe
from quantgate.subject.task import Task

HOSTILE = "x\"'<script>|`](http://e)\n---\nlicense: mit\x00"
# What the gate measured of an embedded checkpoint.
QUALITY = {
    "mean |Δ log-prob|": 0.02406,
    "perplexity": 2.896317,
    "perplexity of the base": 2.883130,
    "mean ΔNLL": 0.0045635,
    "± mean ΔNLL": 0.00068,
}
DIVERGENCE = {
    "Mean KLD": 0.0019088,
    "± Mean KLD": 0.0000531,
    "Same top p": 0.9527125,
    "± Same top p": 0.0021639,
}


def judged(
    check: str, figures: dict[str, float], task: Task = "generate", **other: Any
) -> CheckResult:
    verdict = Verdict("pass", "", (Deviation("bound", 0.1, 1.0),), figures, n=9622)
    values: dict[str, Any] = {"task": task, "base": "org/Tiny-Llama", **other}
    return CheckResult("tiny-llama-w4a16", "W4A16", check, verdict, **values)


def generative(**other: Any) -> list[CheckResult]:
    return [
        judged("quality", QUALITY, **other),
        judged("divergence-from-base", DIVERGENCE, **other),
    ]


def written(directory: Path, results: list[CheckResult], *arguments: str) -> int:
    environment = {"vllm": "0.32.0", "quantgate": "0.1.0", "devices": "AMD EPYC"}
    run = Run(results, "2026-11-21T10:00:00+00:00", 60.0, environment)
    (directory / "gate.json").write_text(gate_json(run))
    return main(["card", str(directory), *arguments])


def test_the_hubs_library_reads_its_metadata(tmp_path: Path) -> None:
    assert written(tmp_path, generative(), "--name", "Tiny-Llama-W4A16") == 0
    data = ModelCard.load(tmp_path / "card.md").data
    assert (data.base_model, data["base_model_relation"]) == ("org/Tiny-Llama", "quantized")
    assert data.model_name == "Tiny-Llama-W4A16"
    found = {result.metric_type: result for result in data.eval_results}
    assert {result.task_type for result in found.values()} == {"text-generation"}
    assert found["perplexity"].metric_value == pytest.approx(2.896317, rel=1e-5)
    recovery = found["recovery"]
    assert recovery.metric_value == pytest.approx(100 * 2.883130 / 2.896317, rel=1e-4)
    assert recovery.metric_args["standard_error"] == pytest.approx(0.0677, rel=1e-2)
    assert found["top_1_agreement"].metric_value == pytest.approx(95.27125, rel=1e-5)
    assert found["kl_divergence"].metric_value == pytest.approx(0.0019088)
    assert found["kl_divergence"].metric_args == {"standard_error": 5.31e-5}
    again = ModelCard(str(ModelCard.load(tmp_path / "card.md")))
    assert vars(again.data) == vars(data)  # what it writes is what it has read


def test_its_metadata_names_the_probe(tmp_path: Path) -> None:
    probes = [ScoredProbe("tiny", "f" * 64, "a" * 64, 30, 32, 3840),
              ScoredProbe("tiny-quality", "f" * 64, "b" * 64, 42, 42, 9622)]  # fmt: skip
    assert written(tmp_path, generative(probes=tuple(probes))) == 0
    for result in ModelCard.load(tmp_path / "card.md").data.eval_results:
        assert result.dataset_name == "quantgate's probe tiny-quality"
        assert result.dataset_args == {"n": 9622, "sha256": "b" * 64}
    content = json.loads((tmp_path / "gate.json").read_text())
    del content["checkpoints"][0]["probes"]  # an earlier version's
    (tmp_path / "gate.json").write_text(json.dumps(content))
    assert main(["card", str(tmp_path)]) == 0
    (first, *_) = ModelCard.load(tmp_path / "card.md").data.eval_results
    assert first.dataset_args == {"n": 9622}


@pytest.mark.parametrize("value", [1e-05, 2e-07, 1.5e300, 3.0, 0.25, None, "1e5", "no", "ä: #\x7f"])
def test_yaml_reads_what_was_written(value: object) -> None:
    import yaml

    content = {"a": [{"b": value, "c": {"d": value}}, {"b": 2}]}
    assert yaml.safe_load("\n".join(card._yaml(content))) == content


def test_the_document_shows_the_card_that_is_written(tmp_path: Path, root: Path) -> None:
    written(tmp_path, generative(), "--name", "Tiny-Llama-W4A16")
    document = (root / "docs" / "model-card.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"````markdown\n(.*?)````", document, re.DOTALL)
    assert shown == (tmp_path / "card.md").read_text(encoding="utf-8")
    assert (root / "docs" / "badge.svg").read_text() == (tmp_path / "badge.svg").read_text()


def test_a_classifier_is_compared_by_its_own_metric(tmp_path: Path) -> None:
    figures = {"entity F1": 0.93, "entity F1 of the base": 0.95, "± loss of entity F1": 0.0095}
    assert written(tmp_path, [judged("quality", figures, "token_classify")]) == 0
    text = (tmp_path / "card.md").read_text()
    assert "| entity F1 | 0.9500 | 0.9300 | 97.9 ± 1.0 % |" in text
    data = ModelCard.load(tmp_path / "card.md").data
    assert data.eval_results[0].task_type == "token-classification"
    assert data.eval_results[0].metric_type == "entity_F1"


def test_a_checkpoint_that_fails_is_shown_to_fail(tmp_path: Path) -> None:
    first, second = generative()
    failed = replace(first, verdict=replace(first.verdict, outcome="fail", emulated=("Emu",)))
    assert written(tmp_path, [failed, second]) == 0
    text = (tmp_path / "card.md").read_text()
    assert "❌ **FAIL**" in text
    assert "1 of 2 checks pass" in text
    assert "Emulated, no evidence about a real kernel: Emu." in text
    texts = ElementTree.fromstring((tmp_path / "badge.svg").read_text()).itertext()
    assert "fail" in list(texts)


def test_what_is_not_finite_is_no_recovery(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [judged("quality", {**QUALITY, "mean ΔNLL": math.nan}), generative()[1]]
    assert written(tmp_path, results) == 0
    assert "| perplexity |" not in (tmp_path / "card.md").read_text()
    assert "nan" not in (tmp_path / "card.md").read_text()
    assert written(tmp_path, results[:1]) == 4
    assert "neither quality nor divergence-from-base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("results", "arguments", "message"),
    [
        (generative(base=None), [], "was judged without a base"),
        (generative(base="/models/x"), [], "the base '/models/x' is no id on the hub"),
        (generative(), ["--base", "../x"], "the base '../x' is no id on the hub"),
        (generative(), ["--checkpoint", "y"], "--checkpoint y: not in it; the report has tiny-l"),
        ([*generative(), replace(generative()[0], checkpoint="y")], [], "give --checkpoint; the"),
        ([judged("drift-serving", {})], [], "neither quality nor divergence-from-base"),
    ],
)
def test_what_has_no_card_is_refused_in_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    results: list[CheckResult],
    arguments: list[str],
    message: str,
) -> None:
    assert written(tmp_path, results, *arguments) == 4
    assert message in capsys.readouterr().err
    assert not (tmp_path / "card.md").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checkpoints": [{"id": "x"}]}', "\xff"])
def test_a_report_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert main(["card", str(tmp_path)]) == 4
    assert "no report there; `quantgate gate` writes it" in capsys.readouterr().err
    (tmp_path / "gate.json").write_bytes(text.encode("latin-1"))
    assert main(["card", str(tmp_path)]) == 4
    assert "not a gate.json of this version" in capsys.readouterr().err


def test_strings_of_a_checkpoint_stay_strings(tmp_path: Path) -> None:
    """In the metadata, the text and the badge."""
    results = [replace(result, scheme=HOSTILE) for result in generative()]
    assert written(tmp_path, results, "--name", HOSTILE) == 0
    text = (tmp_path / "card.md").read_text()
    data = ModelCard.load(tmp_path / "card.md").data
    assert (data.model_name, data.license) == (HOSTILE, None)
    assert "<script>" not in text.split("---\n", 2)[2]
    document = ElementTree.fromstring(badge(HOSTILE, HOSTILE, "pass"))
    assert {element.tag.rpartition("}")[2] for element in document.iter()} == {
        "svg", "title", "rect", "text",
    }  # fmt: skip


def test_a_badge_is_as_wide_as_its_texts() -> None:
    widths = {
        said: int(str(ElementTree.fromstring(badge("a", said, "fail")).get("width")))
        for said in ("x", "xx", "x" * 1000)
    }
    assert widths["xx"] - widths["x"] == 7
    assert widths["x" * 1000] < 500


def test_examples_give_what_they_say() -> None:
    assert doctest.testmod(card).attempted == 1
    assert doctest.testmod(card).failed == 0


def test_a_pass_that_is_no_release_has_no_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a report in a tier that the checkpoint's file does not accept for a release."""
    written(tmp_path, generative())
    content = json.loads((tmp_path / "gate.json").read_text())
    content["checkpoints"][0] |= {"tier": "quick", "required_tier": "full", "released": False}
    (tmp_path / "gate.json").write_text(json.dumps(content))
    assert main(["card", str(tmp_path)]) == 4
    assert "passed in tier quick, but a release of it needs tier full" in capsys.readouterr().err


def test_the_report_names_the_base() -> None:
    content = json.loads(gate_json(Run(generative(), "", 0.0, {})))
    assert content["checkpoints"][0]["base"] == "org/Tiny-Llama"

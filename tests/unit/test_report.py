"""Reports: gate.json's contract, JUnit's outcomes, and strings from a checkpoint kept harmless."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from quantgate.judging.results import CheckResult, upheld
from quantgate.judging.verdict import Deviation, Outcome, Verdict, not_run
from quantgate.measuring.engine import EngineLife
from quantgate.reporting.gate_json import gate_json
from quantgate.reporting.html import index_html
from quantgate.reporting.junit import junit_xml
from quantgate.reporting.markdown import gate_md
from quantgate.reporting.run import Run
from quantgate.reporting.terminal import summary, table
from quantgate.subject.probe import ScoredProbe

HOSTILE = "<b>[red]&\x00\x1b[31m\"'"


def result(outcome: Outcome, check: str = "quality", checkpoint: str = "x") -> CheckResult:
    deviation = Deviation("mean ΔNLL", float("nan") if outcome == "fail" else 0.5, 1.0)
    verdict = Verdict(outcome, HOSTILE, (deviation,), n=7, mde=0.25, emulated=("K",))
    return CheckResult(checkpoint, "W4A16", check, verdict, seconds=1.5)


RESULTS = [result("pass"), result("fail", "drift"), result("not-run", "quality", "y")]


def test_gate_json_keeps_its_contract() -> None:
    engines = [EngineLife("/models/x", "bfloat16", 1.23456, 2.0)]
    text = gate_json(Run(RESULTS, "now", 1.23456, {"vllm": "1"}, engines=engines))
    content = json.loads(text, parse_constant=pytest.fail)
    assert list(content) == [
        "schema", "verdict", "started", "duration_s", "shard", "environment", "engines",
        "checkpoints",
    ]  # fmt: skip
    (engine,) = content["engines"]
    assert engine == {
        "checkpoint": "x", "dtype": "bfloat16", "start_s": 1.235, "served_s": 2.0,
    }  # fmt: skip
    x, y = content["checkpoints"]
    assert (content["verdict"], x["verdict"], y["verdict"]) == ("fail", "fail", "not-run")
    assert (x["id"], x["scheme"], x["task"], x["emulated"]) == ("x", "W4A16", "generate", ["K"])
    assert x["checks"][0] == {
        "name": "quality", "verdict": "pass", "measured": 0.5, "allowed": 1.0, "unit": "nat",
        "noise_floor": None, "n": 7, "mde": 0.25, "unpaired_mde": None, "p_value": None,
        "detail": HOSTILE, "attribution": None, "known_failure": None,
        "since_golden": None, "next_step": None,
        "deviations": [
            {
                "what": "mean ΔNLL", "measured": 0.5, "allowed": 1.0, "unit": "nat",
                "two_sided": False, "noise_floor": None,
            }
        ],
        "figures": {}, "kernels": {}, "emulated": ["K"], "repaired": [], "findings": [],
    }  # fmt: skip
    assert x["checks"][1]["measured"] == "nan"


PROBE = ScoredProbe("<tiny>", "f" * 64, "0123456789ab" + "0" * 52, 30, 32, 3840)


def test_reports_name_what_was_scored() -> None:
    scored = [replace(one, probes=(PROBE,)) for one in RESULTS[:2]]
    run = Run([*scored, RESULTS[2]], "now", 1.0, {})
    x, y = json.loads(gate_json(run))["checkpoints"]
    assert x["probes"] == [
        {
            "name": "<tiny>", "file_sha256": PROBE.file_sha256, "sha256": PROBE.sha256,
            "documents": 30, "windows": 32, "tokens": 3840,
        }
    ]  # fmt: skip
    assert y["probes"] == []
    said = "scored: <tiny> (3,840 tokens, sha256 0123456789ab)"
    assert said in summary(run, width=0, color=False)
    assert "scored: &lt;tiny&gt; \\(3,840 tokens" in gate_md(run)
    assert "scored: &lt;tiny&gt; (3,840 tokens" in index_html(run)
    assert "scored:" not in summary(Run(RESULTS, "now", 1.0, {}), width=0, color=False)


def test_junit_shows_what_did_not_happen_as_an_error() -> None:
    document = ElementTree.fromstring(junit_xml(RESULTS))
    x, y = document
    assert (x.get("tests"), x.get("failures"), x.get("errors")) == ("2", "1", "0")
    assert (y.get("tests"), y.get("failures"), y.get("errors")) == ("1", "0", "1")
    failure = x.find("testcase[@name='drift']/failure")
    assert failure is not None
    assert failure.text is not None
    assert "allowed <= 1" in failure.text
    assert document.find(".//skipped") is None


def test_the_table_shows_every_check_and_takes_no_markup_from_a_checkpoint() -> None:
    rows = [*RESULTS, result("inconclusive", HOSTILE, "[bold]z")]
    text = table(rows, width=160, color=False)
    for word in (
        "quality 0.5 of 1",
        "+0.5 nat",
        "1 of 2",
        "FAIL",
        "NOT-RUN",
        "INCONCLUSIVE",
        "[bold]z",
        "verdict: FAIL",
    ):
        assert word in text
    assert "emulated, no evidence about a real kernel: K in x, y, [bold]z" in text


def test_several_checkpoints_have_one_row_each_and_what_is_no_pass_is_detailed() -> None:
    rows = [result("pass"), result("pass", "drift"), result("pass", "drift", "y")]
    text = table(rows, width=160, color=False)
    first_words = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [word for word in first_words if word in "xy"] == ["x", "y"]
    assert text.count("PASS") == 3  # each checkpoint's, and the run's
    assert "allowed" not in text
    assert "allowed" in table([*rows, result("fail", "quality", "y")], width=160, color=False)
    assert "allowed" in table(rows[:2], width=160, color=False)


def test_no_figure_is_cut_off_in_a_narrow_terminal() -> None:
    rows = [*RESULTS, replace(result("pass", checkpoint="a" * 90), scheme="b" * 60)]
    for shown in (rows, rows[:1]):
        assert "…" not in table(shown, width=60, color=False)


def test_the_check_nearest_to_its_limit_is_named() -> None:
    """By the share of the allowance, on either side of 0 where that is what is allowed."""
    near = Deviation("shift", -0.009, 0.01, two_sided=True)
    far = replace(near, measured=-0.9, two_sided=False)
    rows = [
        CheckResult(name, "W4A16", check, Verdict("pass", "", (found,)))
        for name in "xy"
        for check, found in (("drift", near), ("quality", Deviation("Δ", 0.5, 1.0)), ("seen", far))
    ]
    assert table(rows, width=60, color=False).count("drift -0.009 of ±0.01") == 2
    failed = Verdict("fail", "", (replace(near, measured=1.0),), known_failure="reported")
    text = table([*rows, CheckResult("y", "W4A16", "head", failed)], width=60, color=False)
    assert text.count("drift -0.009 of ±0.01") == 2


def test_a_known_failure_is_shown_and_does_not_count() -> None:
    failed = result("fail", "replay")
    known = replace(failed, verdict=replace(failed.verdict, known_failure=f"{HOSTILE} (issue 7)"))
    assert "FAIL (known)" in table([known], width=160, color=False)
    assert table([known], width=160, color=False).rstrip().endswith("verdict: PASS")
    content = json.loads(gate_json(Run([known], "", 0, {})))
    (check,) = content["checkpoints"][0]["checks"]
    assert (content["verdict"], check["verdict"]) == ("pass", "fail")
    assert check["known_failure"].endswith("(issue 7)")
    (suite,) = ElementTree.fromstring(junit_xml([known]))
    assert suite.get("failures") == "0"
    assert suite.find("testcase/skipped[@type='known-failure']") is not None


def test_a_failures_message_holds_nothing_that_a_terminal_obeys() -> None:
    verdict = Verdict("fail", HOSTILE, evidence=(HOSTILE,), attribution=HOSTILE)
    message = verdict.message("x")
    assert all(character.isprintable() for line in message.split("\n") for character in line)
    assert len(message.split("\n")) == 3


def test_a_check_that_did_not_happen_claims_no_kernel() -> None:
    missing = CheckResult("x", "W4A16", "drift", not_run("no golden"))
    assert "native" not in table([missing], width=110, color=False)


def test_a_result_survives_the_way_from_a_worker() -> None:
    before = result("pass")
    assert CheckResult.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def statistical(outcome: Outcome, p_value: float, checkpoint: str = "x") -> CheckResult:
    before = result(outcome, checkpoint=checkpoint)
    return replace(before, verdict=replace(before.verdict, p_value=p_value))


def test_a_statistical_fail_stands_where_holm_upholds_it() -> None:
    """One of three at 0.03 is chance; at 0.01 it is not, and alone 0.03 is not."""
    others = [statistical("pass", 0.9), statistical("inconclusive", 0.4)]
    for p_value, expected in ((0.03, "inconclusive"), (0.01, "fail")):
        found = upheld([*others, statistical("fail", p_value), result("fail")])
        assert [r.verdict.outcome for r in found] == ["pass", "inconclusive", expected, "fail"]
    assert "Holm's p 0.09" in upheld([*others, statistical("fail", 0.03)])[2].verdict.detail
    alone = [statistical("pass", 0.9, "y"), statistical("fail", 0.03)]
    assert upheld(alone) == alone

"""The page and the comment: whole, silent, self-contained, and harmless whatever they hold."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
from pages import CHROMIUM, browse, elements

from quantgate.judging.checks import place_of
from quantgate.judging.evidence import POSITION_BINS, WORST_TOKENS
from quantgate.judging.results import CheckResult
from quantgate.judging.verdict import Deviation, Outcome, Profile, Verdict, WorstToken
from quantgate.measuring.engine import EngineLife
from quantgate.reporting.gate_json import gate_json
from quantgate.reporting.html import index_html
from quantgate.reporting.junit import junit_xml
from quantgate.reporting.markdown import gate_md
from quantgate.reporting.run import Run
from quantgate.reporting.write import FILES, write_reports
from quantgate.subject.passage import Passage

MEGABYTE = "<i>A</i>" * 130_000
HOSTILE = [
    "<script>document.title='owned';console.log('owned')</script>",
    "<img src=http://evil.example/x onerror=console.log('owned')>",
    "../../etc/passwd",
    "\x1b[31m\x00\u202e",
    "'\"></details><h1>owned",
    "| a | b |\n## owned `` ```\n[x](http://evil.example)",
    "{{ 7 * 7 }}{% raw %}",
    MEGABYTE,
]


def result(
    text: str, outcome: Outcome = "pass", checkpoint: str = "x", check: str = "quality"
) -> CheckResult:
    """A check whose every string is `text`."""
    worst = WorstToken(
        text[:200], Passage(text[:200], text[:200], text[:200]), text[:200], -1.5, -0.25
    )
    positions = ((0, 1e-7, 1e-6), (32, float("inf"), float("inf")), (64, 0.0, 0.0))
    verdict = Verdict(
        outcome,
        text[:2000],
        (Deviation(text[:200], float("nan") if outcome == "fail" else 0.5, 1.0, floor=0.01),),
        figures={text[:200]: 1.0},
        n=7,
        mde=0.25,
        kernels={text[:200]: text[:200]},
        emulated=(text[:200],),
        evidence=(text,),
        profile=Profile(positions, (worst,) * 10, (0, 3, 9, 1)),
        since_golden=text[:2000],
        next_step=text[:2000],
        attribution=text[:2000],
    )
    return CheckResult(checkpoint, text[:200], check, verdict, seconds=1.5)


def run_of(results: list[CheckResult], text: str = "text") -> Run:
    entry = {"date": "2026-11-21", "mean_nll": 1.5, "reason": text, "versions": {text[:99]: text}}
    return Run(
        results,
        "2026-11-21T12:00:00+00:00",
        12.5,
        {"vllm": text[:99]},
        [(text[:99], text[:99])],
        [text[:99]],
        [EngineLife(text[:99], "bfloat16", 0.5, 2.0)],
        {"x": [entry, {**entry, "mean_nll": 1.25}]},
    )


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_no_string_becomes_an_element(text: str) -> None:
    """The page has the same elements whatever the strings are."""
    plain, hostile = (
        elements(index_html(run_of([result(t), result(t, "fail")], t))) for t in ("text", text)
    )
    assert hostile.tags == plain.tags
    assert hostile.loads == plain.loads
    assert all(load.startswith(("href=#", "href=data:,")) for load in plain.loads)
    assert "script" not in plain.tags


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_no_report_grows_or_breaks_by_a_string(text: str, tmp_path: Path) -> None:
    results = [result(text), result(text, "fail", "y"), result(text, "not-run", "z")]
    write_reports(run_of(results, text[:2000]), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 200_000
    comment = (tmp_path / "gate.md").read_text()
    assert "<script" not in re.sub(r"^    .*$", "", comment, flags=re.MULTILINE)
    assert "<img" not in re.sub(r"^    .*$", "", comment, flags=re.MULTILINE)
    assert len([line for line in comment.splitlines() if line.startswith("| ")]) == 4
    assert not re.search(r"^#+ owned", comment, re.MULTILINE)


def test_the_page_says_what_a_decision_needs() -> None:
    page = index_html(run_of([result("text"), result("text", "fail", check="drift")]))
    for words in (
        "FAIL", "noise floor", "MDE", "<mark>text</mark>", "-1.500000", "tokens by KL divergence",
        "by position", "emulated, no evidence about a real kernel",
        "2 approved, last on 2026-11-21",
        "<polyline", "Since then", "0.01",
    ):  # fmt: skip
        assert words in page, words


def test_what_is_equal_has_no_chart_and_checks_stand_as_they_are_read() -> None:
    one = result("text", check="drift-float32")
    equal = Profile(((0, 0.0, 0.0), (32, 0.0, 0.0)))
    same = replace(one, verdict=replace(one.verdict, profile=equal))
    assert "<svg" not in index_html(Run([same], "", 1.0, {}))
    several = ["mine", "drift-float32", "quality", "replay-serving", "fidelity-float32"]
    run = run_of([replace(same, check=check) for check in several])
    page = index_html(replace(run, place_of=place_of))
    places = [page.index(f"<span>{check}</span>") for check in several]
    assert places == sorted(places, reverse=True)


def test_a_page_of_forty_five_checkpoints_is_under_three_megabytes() -> None:
    """Ten checks each, with ten worst tokens in a line of text, all positions and a KLD."""
    positions = tuple((32 * i, 1.234e-7 * i, 4.321e-6 * i) for i in range(POSITION_BINS))
    passage = Passage("of the archive of the town, and then " * 2, " Mertram", " asked again why.")
    worst = WorstToken("heldout-long-00003[871]", passage, "", -4.347977, -4.347276)
    one = result("a check says so much of what it found, and no more than that", check="quality")
    profile = Profile(positions, (worst,) * WORST_TOKENS, (0, 3, 9, 1))
    shown = replace(one, verdict=replace(one.verdict, profile=profile))
    checks = [f"invariance-{i}" for i in range(10)]
    results = [
        replace(shown, checkpoint=f"tiny-llama-w8a8-static-{i:02}", check=check)
        for i in range(45)
        for check in checks
    ]
    size = len(index_html(run_of(results)).encode())
    assert 1_000_000 < size < 3_000_000, size


def test_gate_json_is_what_its_schema_says(root: Path) -> None:
    schema = json.loads((root / "src/quantgate/reporting/gate.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    outcomes: list[Outcome] = ["pass", "fail", "inconclusive", "not-run"]
    text = gate_json(run_of([result("a", outcome, outcome) for outcome in outcomes]))
    jsonschema.validate(json.loads(text), schema)
    older = json.loads(text)
    del older["checkpoints"][0]["probes"]
    jsonschema.validate(older, schema)
    broken = json.loads(text)
    broken["checkpoints"][0]["checks"][0]["verdict"] = "skipped"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)


def test_a_comment_names_what_did_not_pass_and_no_more_than_fits() -> None:
    many = [result(f"text {i}", "fail", f"c{i}") for i in range(200)]
    comment = gate_md(run_of([result("text"), *many]))
    assert comment.startswith("## ❌ Quantgate: FAIL\n")
    assert len(comment) < 65_536
    assert "… and 180 more: see index.html." in comment
    assert gate_md(run_of([result("text")])).startswith("## ✅ Quantgate: PASS\n")


def test_a_known_failure_is_no_failure_in_the_comment() -> None:
    one = result("text", "fail")
    known = replace(one, verdict=replace(one.verdict, known_failure="why (issue)"))
    comment = gate_md(run_of([known]))
    assert comment.startswith("## ✅ Quantgate: PASS\n")
    assert "quality FAIL \\(known\\)" in comment
    assert 'failures="0"' in junit_xml([known])


@pytest.mark.skipif(CHROMIUM is None, reason="not run: no chromium here, apt-get install chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_silently_and_asks_nobody(tmp_path: Path, dark: bool) -> None:
    """Rendered, without a console message, without a request but for the file itself."""
    results = [result(text, "fail", f"c{i}") for i, text in enumerate(HOSTILE[:-1])]
    page, log = tmp_path / "index.html", tmp_path / "net.json"
    page.write_text(index_html(run_of(results)), encoding="utf-8")
    done = browse(
        page, tmp_path, f"--log-net-log={log}", f"--screenshot={tmp_path / 'page.png'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    assert "<title>Quantgate: FAIL</title>" in done.stdout
    assert done.stdout.count("<details") >= len(results)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert "evil.example" not in log.read_text(errors="replace")

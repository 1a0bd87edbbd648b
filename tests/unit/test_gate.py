"""Every check is asked by one test, and says what to do next."""

import dataclasses
import re
from pathlib import Path

import pytest

from quantgate.judging import checks
from quantgate.judging.next_step import next_step
from quantgate.judging.verdict import Deviation, Verdict
from quantgate.subject.checkpoint_file import read_checkpoint_files


def test_every_check_is_asked_by_one_test_of_the_suites(root: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted((root / "suites").glob("*.py"))]
    asked = re.findall(r"^def (test_\w+)", "\n".join(texts), re.MULTILINE)
    found = [checks.of_test(function) for function in asked]
    assert {*found} == {*checks.CHECKS}
    assert len(found) == len(checks.CHECKS)
    names = [name for check in checks.CHECKS for name in check.names]
    assert len(names) == len(set(names))
    places = [checks.place_of(name) for name in [*names, "seen"]]
    assert places == sorted(places)
    assert set(places) == {*range(len(checks.CHECKS) + 1)}


def test_every_check_that_can_fail_says_what_to_do_next(root: Path) -> None:
    """Drift's verdict names the tool that approves, the audit's the command that explains."""
    known = read_checkpoint_files(root)["tiny-llama-w4a16"]
    by_path = dataclasses.replace(known, scheme=None, source="/my models/x", base="org/base")
    failed = Verdict("fail", "off", (Deviation("bound", 0.2, 0.1),))
    for check in checks.CHECKS:
        for name in check.names:
            by_itself = check.family in ("drift", "audit", "audit-weights", "audit-loaded")
            assert bool(next_step(checks.named(name), failed, known)) is not by_itself, name
    assert next_step(checks.named("fidelity-float32"), failed, known).endswith(
        "quantgate gate tiny-llama-w4a16 -- -k replay"
    )
    assert "quantgate gate '/my models/x' --base org/base -- " in next_step(
        checks.named("replay-serving"), failed, by_path
    )
    assert "sequential_quality" in next_step(
        checks.named("quality"), Verdict("inconclusive", ""), known
    )


@pytest.mark.parametrize(
    ("measured", "fault"), [(0.2, False), (1.0, False), (1.001, True), (float("nan"), True)]
)
@pytest.mark.parametrize("check", ["quality", "divergence-from-base"])
def test_a_loss_far_beyond_its_margin_is_no_reason_to_raise_it(
    root: Path, check: str, measured: float, fault: bool
) -> None:
    known = read_checkpoint_files(root)["tiny-llama-w4a16"]
    verdict = Verdict("fail", "off", (Deviation("bound", measured, 0.1),))
    step = next_step(checks.named(check), verdict, known)
    assert ("do not raise the margin" in step) is fault
    assert ("give [budget.quality] a margin" in step) is not fault
    assert ('tiny-llama-w4a16 -- -k "fidelity or replay"' in step) is fault

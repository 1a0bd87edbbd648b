"""The noise floor: stored beside goldens, printed beside limits, and above a limit no verdict."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.judging import noise
from quantgate.judging.golden import GoldenKey
from quantgate.judging.noise import NoiseFloor, Rerun
from quantgate.judging.verdict import Deviation, Outcome, Verdict
from quantgate.measuring.measurement import Provenance
from quantgate.subject.checkpoint_file import read_checkpoint_files

KEY = GoldenKey("0" * 64, "1" * 64, "cpu", "bfloat16", "auto", "portable")
PROVENANCE = Provenance("engine", "cpu", "cpu", "bfloat16", {"lm_head": "X"}, ("X",))
STATISTICS = st.sampled_from(["mean", "mean_abs", "max_abs", "kld", "metric"])
MOVES = st.dictionaries(STATISTICS, st.floats(0, 1e9, allow_nan=False))


def floor_of(*moves: float) -> NoiseFloor:
    reruns = tuple(Rerun(f"rerun {i}", {"mean": move}) for i, move in enumerate(moves))
    return NoiseFloor(KEY, reruns, PROVENANCE)


@given(reruns=st.dictionaries(st.text(min_size=1), MOVES, max_size=5))
def test_a_floor_reads_back_as_it_was(reruns: dict[str, dict[str, float]]) -> None:
    floor = NoiseFloor(KEY, tuple(Rerun(name, dict(m)) for name, m in reruns.items()), PROVENANCE)  # type: ignore[arg-type]
    found = noise.from_json(noise.to_json(floor), "x.json")
    assert {r.name: r.moved for r in found.reruns} == {r.name: r.moved for r in floor.reruns}
    assert (found.key, found.provenance) == (floor.key, floor.provenance)


@pytest.mark.parametrize(
    "damage",
    ["", "{}", '{"schema": 2}', '{"schema": 1, "key": {}}', "[1]"],
)
def test_a_damaged_floor_is_one_sentence(damage: str) -> None:
    with pytest.raises(BadInput, match=r"^x\.json: "):
        noise.from_json(damage, "x.json")
    content = json.loads(noise.to_json(floor_of(1.0)))
    content["reruns"] = {"a": {"median": 1.0}}
    with pytest.raises(BadInput, match=r"x\.json: damaged .*`quantgate approve`\.$"):
        noise.from_json(json.dumps(content), "x.json")


@pytest.mark.parametrize(
    ("outcome", "measured", "floor", "expected"),
    [
        ("pass", 0.5, 0.1, "pass"),
        ("pass", 0.5, 1.5, "inconclusive"),
        ("pass", 0.5, math.nan, "inconclusive"),
        ("fail", 2.0, 0.1, "fail"),
        ("fail", 2.0, 1.5, "inconclusive"),
        ("fail", 3.0, 1.5, "fail"),
        ("fail", -2.0, 1.5, "inconclusive"),
        ("fail", -3.0, 1.5, "fail"),
        ("fail", math.nan, 1.5, "fail"),
        ("not-run", 0.5, 1.5, "not-run"),
        ("inconclusive", 0.5, 1.5, "inconclusive"),
    ],
)
def test_above_its_limit_noise_leaves_no_verdict_but_a_plain_fail(
    outcome: Outcome, measured: float, floor: float, expected: Outcome
) -> None:
    """The limit is 1 on either side."""
    deviation = Deviation("mean", measured, 1.0, two_sided=True, statistic="mean")
    verdict = noise.beside(Verdict(outcome, "d", (deviation,)), lambda: floor_of(0.01, floor))
    assert verdict.outcome == expected
    assert ("noise alone moves it" in verdict.detail) == (
        expected == "inconclusive" and outcome != "not-run"
    )
    assert verdict.deviations[0].floor == pytest.approx(floor, nan_ok=True)


def test_a_fail_for_another_reason_stands_beside_a_drowned_limit() -> None:
    drowned = Deviation("mean", 0.5, 1.0, statistic="mean")
    verdict = Verdict("fail", "d", (drowned, Deviation("non-finite values", 3, 0)))
    assert noise.beside(verdict, lambda: floor_of(2.0)).outcome == "fail"


def test_what_noise_does_not_move_asks_for_no_floor() -> None:
    verdict = Verdict("pass", "d", (Deviation("labels", 0, 0),))

    def never() -> NoiseFloor:
        raise AssertionError

    assert noise.beside(verdict, never) is verdict


def test_every_golden_has_a_floor_of_its_own_key(root: Path) -> None:
    for checkpoint in read_checkpoint_files(root).values():
        if not checkpoint.golden:
            continue
        for dtype in ("float32", "serving"):
            path = noise.noise_path(checkpoint, dtype, "cpu")
            floor = noise.from_json(path.read_text(encoding="utf-8"), path)
            golden = path.with_name(f"drift-{dtype}.cpu.json")
            assert json.loads(golden.read_text())["key"] == dataclasses.asdict(floor.key), path
            assert len(floor.reruns) >= (4 if dtype == "serving" else 3)

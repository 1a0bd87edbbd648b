"""Tiers and collections: what each asks, and what a run of a lower tier does not release."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantgate.errors import BadInput
from quantgate.judging.checks import CHECKS
from quantgate.reporting.run import tiers_line
from quantgate.subject import windows
from quantgate.subject.checkpoint import Checkpoint
from quantgate.subject.checkpoint_file import read_all_checkpoint_files, read_checkpoint_files
from quantgate.subject.probe import CHAT_DATE, Probe, Window, encode, read_probe, stored_probe
from quantgate.subject.tier import TIERS, RunTier, Tier, covers

SCHEME = 'source = "./x"\nscheme = "W4A16"\n'


def probe_of(sizes: list[int], strata: list[str]) -> Probe:
    made = (
        Window(f"d{i}", stratum, 1, tuple(range(size)), "")
        for i, (size, stratum) in enumerate(zip(sizes, strata, strict=True))
    )
    return Probe("p", 10**6, tuple(made))


def test_each_tier_covers_itself_and_those_below() -> None:
    assert [[covers(tier, asked) for asked in TIERS] for tier in TIERS] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_the_quick_tier_asks_whether_it_is_computed_right_and_what_it_cost() -> None:
    quick = {check.family for check in CHECKS if check.tier == "quick"}
    assert {"audit", "fidelity", "replay", "quality"} <= quick
    assert not {"drift", "invariance", "tensor-parallel", "long-context"} & quick
    assert [check.family for check in CHECKS if check.tier == "full"] == ["long-context"]


@given(st.lists(st.tuples(st.integers(2, 3000), st.sampled_from("abc")), min_size=1, max_size=40))
def test_the_quick_tier_scores_few_tokens_of_every_stratum(drawn: list[tuple[int, str]]) -> None:
    sizes, strata = [size for size, _ in drawn], [stratum for _, stratum in drawn]
    short = [i for i, size in enumerate(sizes) if size <= windows.LONG_CONTEXT]
    probe = probe_of(sizes, strata)
    if not short:
        with pytest.raises(BadInput, match="each of its windows has more than 2,048 tokens"):
            windows.for_tier(probe, "standard")
        return
    assert windows.for_tier(probe, "full").windows == tuple(probe.windows[i] for i in short)
    quick = windows.for_tier(probe, "quick").windows
    tokens = sum(len(window.ids) for window in quick)
    assert tokens <= windows.QUICK_TOKENS or len(quick) == 1
    # A stratum is represented unless its turn comes after the tokens have run out.
    if len(quick) >= len({strata[i] for i in short}):
        assert {window.stratum for window in quick} == {strata[i] for i in short}


def test_long_contexts_are_those_that_the_model_takes() -> None:
    probe = probe_of([100, 3000, 5000], ["a", "long", "long"])
    found = windows.long_contexts(probe, None)
    assert found is not None
    assert [len(window.ids) for window in found.windows] == [3000, 5000]
    found = windows.long_contexts(probe, 4096)
    assert found is not None
    assert [len(window.ids) for window in found.windows] == [3000]
    assert windows.long_contexts(probe, 2048) is None


@pytest.mark.parametrize(
    ("asked", "required", "said"),
    [
        ("quick", "standard", "the file of a asks for tier standard, so this run does not release"),
        ("standard", "full", "the file of a asks for tier full, so this run does not release it"),
        ("quick", "quick", "tier: quick; --tier standard adds"),
        ("full", "quick", "tier: full"),
    ],
)
def test_the_report_says_which_tier_it_was(asked: Tier, required: Tier, said: str) -> None:
    tier = RunTier(asked, required)
    line = tiers_line({"a": tier})
    assert said in line
    assert ("does not release" in line) == (not tier.suffices)


def test_a_collection_is_judged_by_itself_and_found_by_id(tmp_path: Path) -> None:
    folder = tmp_path / "fixtures" / "checkpoints"
    (folder / "real").mkdir(parents=True)
    (folder / "a.toml").write_text(SCHEME)
    (folder / "real" / "b.toml").write_text(SCHEME + 'tier = "full"\n')
    assert list(read_checkpoint_files(tmp_path)) == ["a"]
    assert list(read_checkpoint_files(tmp_path, "real")) == ["b"]
    found = read_all_checkpoint_files(tmp_path)
    assert [one.file for one in found.values()] == [
        "fixtures/checkpoints/a.toml",
        "fixtures/checkpoints/real/b.toml",
    ]
    assert found["b"].tier == "full"
    (folder / "real" / "a.toml").write_text(SCHEME)
    with pytest.raises(BadInput, match="has the same name"):
        read_all_checkpoint_files(tmp_path)


def test_a_probe_is_found_by_name_or_by_path(tmp_path: Path) -> None:
    folder = tmp_path / "fixtures" / "probes"
    folder.mkdir(parents=True)
    rows = [{"probe": "mine"}, {"document": "a", "stratum": "s", "text": "Some text."}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "mine.jsonl").write_text(text)
    (tmp_path / "other.jsonl").write_text(text.replace("Some", "Other"))
    checkpoint = Checkpoint("c", "./x", root=tmp_path, probe="mine")
    assert stored_probe(checkpoint).windows[0].text == "Some text."
    # There is no larger one.
    assert stored_probe(checkpoint, True) == stored_probe(checkpoint)
    (folder / "mine-quality.jsonl").write_text(text.replace("Some", "More"))
    assert stored_probe(checkpoint, True).windows[0].text == "More text."
    assert stored_probe(checkpoint, named="./other.jsonl").windows[0].text == "Other text."
    with pytest.raises(BadInput, match=r"theirs\.jsonl: no such probe; give a path, or one of"):
        stored_probe(checkpoint, named="theirs")
    wrong = Checkpoint("c", "./x", root=tmp_path, probe="mine", task="token_classify")
    with pytest.raises(BadInput, match="a probe for task 'generate', but c is judged at"):
        stored_probe(wrong)


class Tokenizer:
    """One id a character; a chat between bars."""

    chat_template: str | None = "a template"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [*([0] if add_special_tokens else []), *map(ord, text)]}

    def apply_chat_template(self, turns: Any, *, tokenize: bool, date_string: str) -> str:
        assert not tokenize
        assert date_string == CHAT_DATE
        return "|".join(turn["content"] for turn in turns)


def test_a_chat_goes_through_the_models_own_template() -> None:
    window = Window("d", "chat", 1, (), "plain", chat=(("user", "a"), ("assistant", "b")))
    tokenizer = Tokenizer()
    assert encode(tokenizer, window) == tuple(map(ord, "a|b"))
    tokenizer.chat_template = None
    assert encode(tokenizer, window) == (0, *map(ord, "plain"))


def test_the_probe_of_real_text_has_each_kind(root: Path) -> None:
    probe = read_probe(root / "fixtures" / "probes" / "real.jsonl")
    strata = {"prose", "languages", "code", "documentation", "digits", "chat", "long"}
    assert {window.stratum for window in probe.windows} == strata
    long = windows.long_contexts(probe, 8192)
    assert long is not None
    assert [4096 < len(window.ids) <= 8192 for window in long.windows] == [True, True]
    files = (root / "fixtures" / "probes").glob("real*.jsonl")
    assert sum(file.stat().st_size for file in files) <= 2e6

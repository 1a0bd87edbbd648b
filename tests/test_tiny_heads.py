"""The shipped token models learned their tasks, and the labels that they learned from are right."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted(path.parent.name for path in ROOT.glob("fixtures/tiny/*-*/training.json"))


@pytest.fixture(scope="module")
def heads(tool: Callable[[str], ModuleType]) -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))  # for tiny_corpus, which the script imports
    yield tool("make_tiny_heads")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def tokenizer(heads: ModuleType) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(heads.BASE)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_does_as_well_as_its_record_says(
    heads: ModuleType, tokenizer: Any, name: str
) -> None:
    import torch
    from transformers import AutoModelForTokenClassification

    folder = heads.TINY / name
    record = json.loads((folder / "training.json").read_text())["heldout"]
    assert record["macro_f1"] >= heads.SMALLEST_SCORE
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    found = heads.score(model, list(heads.TASKS[name].examples(tokenizer, "heldout", 40)))
    assert found["macro_f1"] >= heads.SMALLEST_SCORE
    assert found["accuracy"] == pytest.approx(record["accuracy"], abs=0.02)


def test_a_step_is_labelled_right_where_its_equation_holds(
    heads: ModuleType, tokenizer: Any
) -> None:
    labels = []
    for example in heads.step_examples(tokenizer, "heldout", 60):
        for place, label in enumerate(example.labels):
            if label == heads.IGNORED:
                continue
            line = tokenizer.decode(example.ids[: place + 1]).rstrip("\n").rpartition("\n")[2]
            if equation := re.fullmatch(r"Step \d: (\d+) ([-+*]) (\d+) = (\d+)\.", line):
                a, b, result = (int(equation[i]) for i in (1, 3, 4))
                holds = {"+": a + b, "-": a - b, "*": a * b}[equation[2]] == result
                assert label == holds
                labels.append(label)
    assert 0.25 < 1 - sum(labels) / len(labels) < 0.5


def test_a_tokens_label_is_the_entitys_that_it_is_in(heads: ModuleType, tokenizer: Any) -> None:
    seen = set()
    for example in heads.entity_examples(tokenizer, "heldout", 20):
        for token, label in zip(example.ids, example.labels, strict=True):
            if label == heads.NER_LABELS.index("PERSON"):
                assert tokenizer.decode([token]).strip(" .,:'\"\n").isalpha()
            seen.add(label)
    assert seen == {heads.IGNORED, *range(len(heads.NER_LABELS))}

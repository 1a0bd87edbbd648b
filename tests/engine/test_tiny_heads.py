"""The shipped token models learned their tasks, and the labels that they learned from are right."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tiny import TINY
from tiny.corpus.stories import TOPICS
from tiny.heads import examples, probes

ROOT = Path(__file__).resolve().parents[2]
MODELS = sorted(path.parent.name for path in ROOT.glob("fixtures/tiny/*-*/training.json"))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "llama")


def loaded(folder: Path) -> Any:
    """A shipped model in float32, as transformers loads it, or as our own classes do."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from quantgate.measuring.heads import COLBERT, head_classes

    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    options: dict[str, Any] = {"dtype": torch.float32}
    if architecture in head_classes():
        kind = head_classes()[architecture]
        config = kind.config_class.from_pretrained(folder)
        if architecture == COLBERT:
            config.colbert_dim = 32
        options["config"] = config
    elif "Sequence" in architecture:
        kind = AutoModelForSequenceClassification
    else:
        kind = AutoModelForTokenClassification
    return kind.from_pretrained(folder, **options).eval()


def test_every_model_is_shipped() -> None:
    from tiny.heads.tasks import TASKS

    assert sorted(TASKS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_a_model_does_as_well_as_its_record_says(tokenizer: Any, name: str) -> None:
    from tiny.heads.tasks import SMALLEST_SCORE, TASKS

    folder = TINY / name
    record = json.loads((folder / "training.json").read_text())["heldout"]
    headline = next(iter(record))
    assert record[headline] >= SMALLEST_SCORE
    task = TASKS[name]
    found = task.score(loaded(folder), list(task.examples(tokenizer, "heldout", 40)))
    assert found[headline] >= SMALLEST_SCORE
    assert found["accuracy"] == pytest.approx(record["accuracy"], abs=0.05)


def test_the_models_are_small() -> None:
    sizes = [path.stat().st_size for path in TINY.rglob("*.safetensors")]
    assert max(sizes) <= 6e6
    assert sum(sizes) <= 40e6


@pytest.mark.parametrize("kind", ["", "-quality"])
@pytest.mark.parametrize("name", ["entities", "steps", "graded", "retrieval"])
def test_a_probe_is_what_its_command_writes(tokenizer: Any, name: str, kind: str) -> None:
    stored = (ROOT / "fixtures" / "probes" / f"{name}{kind}.jsonl").read_text(encoding="utf-8")
    assert stored == "".join(probes.probe_lines(name + kind, tokenizer))


def test_a_step_is_right_where_its_thing_belongs_to_the_place(tokenizer: Any) -> None:
    labels = []
    for example in examples.step_examples(tokenizer, "heldout", 60):
        title = example.text.partition(" is to be")[0]
        (place,) = [topic for topic in TOPICS if topic.title == title]
        things = re.findall(r"put back the (\w+)\.\n", example.text)
        found = [label for label in example.labels if label != examples.IGNORED]
        assert found == [int(thing in place.nouns) for thing in things]
        labels += found
    assert 0.25 < 1 - sum(labels) / len(labels) < 0.55


def test_a_grade_counts_the_damaged_sentences(tokenizer: Any) -> None:
    grades = []
    for example in examples.graded_examples(tokenizer, "heldout", 40):
        assert set(example.labels[:-1]) == {examples.IGNORED}
        grades.append(example.labels[-1])
    assert set(grades) == {0, -1, -2, -3, -4}


def test_a_question_is_followed_by_the_story_that_answers_it(tokenizer: Any) -> None:
    pairs = list(examples.retrieval_examples(tokenizer, "heldout", 20))
    for question, story in zip(pairs[::2], pairs[1::2], strict=True):
        names = question.text.removeprefix("What about ").removesuffix("?").split(" and ")
        assert [name for name in names if name not in story.text] == []


def test_a_tokens_label_is_the_entitys_that_it_is_in(tokenizer: Any) -> None:
    seen = set()
    for example in examples.entity_examples(tokenizer, "heldout", 20):
        for token, label in zip(example.ids, example.labels, strict=True):
            if label == examples.NER_LABELS.index("PERSON"):
                assert tokenizer.decode([token]).strip(" .,:'\"\n").isalpha()
            seen.add(label)
    assert seen == {examples.IGNORED, *range(len(examples.NER_LABELS))}

"""The models with heads: what each of them is, what it learns, and how long."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import (
    BertForTokenClassification,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
)

from quantgate.measuring.heads import COLBERT, PROCESS_REWARD, head_classes
from tiny import TINY
from tiny.heads.examples import (
    NER_LABELS,
    STEP_LABELS,
    Example,
    entity_examples,
    graded_examples,
    retrieval_examples,
    step_examples,
)
from tiny.heads.losses import Loss, cross_entropy, in_batch_retrieval, pairwise_ranking
from tiny.heads.models import bert, labelled, qwen2
from tiny.heads.scores import Score, classification_score, ranking_score, retrieval_score

COLBERT_DIM = 32
# What each of them must reach on held-out examples, by the first of its scores.
SMALLEST_SCORE = 0.9


@dataclass(frozen=True)
class Task:
    """One model: what it is, what it learns, and how long."""

    model: Callable[[], Any]
    examples: Callable[[Any, str, int], Iterator[Example]]
    passes: int
    loss: Loss = cross_entropy
    score: Score = classification_score
    training: int = 6000
    """Examples."""
    together: int = 1
    """Examples that belong together, one after the other."""
    rate: float = 1e-3


TASKS = {
    "ner-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, NER_LABELS), entity_examples, passes=1
    ),
    "ner-bert": Task(
        lambda: bert(BertForTokenClassification, **labelled(NER_LABELS)), entity_examples, passes=8
    ),
    # Soft labels and a low rate: a model that is sure of itself amplifies float32's rounding, and
    # what is looked for in float32 hides in that.
    "prm-qwen2": Task(
        lambda: qwen2(Qwen2ForTokenClassification, STEP_LABELS),
        step_examples,
        passes=1,
        loss=partial(cross_entropy, smoothing=0.1),
        rate=3e-4,
    ),
    "prm-native": Task(
        lambda: qwen2(head_classes()[PROCESS_REWARD], STEP_LABELS, body=TINY / "prm-qwen2"),
        step_examples,
        passes=1,
        loss=partial(cross_entropy, smoothing=0.1),
        training=2000,
        rate=3e-4,
    ),
    "reward-qwen2": Task(
        lambda: qwen2(Qwen2ForSequenceClassification, ["reward"]),
        graded_examples,
        passes=2,
        loss=pairwise_ranking,
        score=ranking_score,
        training=4000,
    ),
    "colbert-bert": Task(
        lambda: bert(head_classes()[COLBERT], colbert_dim=COLBERT_DIM),
        retrieval_examples,
        passes=1,
        loss=in_batch_retrieval,
        score=retrieval_score,
        training=2000,
        together=2,
    ),
}

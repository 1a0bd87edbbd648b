"""A checkpoint's task: generating, or pooling hidden states into labels, rewards, embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["generate", "token_classify", "token_reward", "sequence_reward", "token_embed"]
GENERATE: Task = "generate"
SEQUENCE_REWARD: Task = "sequence_reward"
EMBED: Task = "token_embed"

LAYER = re.compile(r"\blayers?\.\d+\.")
# The names of the linears in pooling models' heads, in vLLM and transformers.
HEADS = ("score", "score.0", "score.2", "classifier", "v_head")

# Parts of architecture names that determine the task; more specific ones come first.
_TASK_OF_ARCHITECTURE: Mapping[str, Task] = {
    "ProcessRewardModel": "token_reward",
    "RewardModel": "token_reward",
    "ForTokenClassification": "token_classify",
    "ForSequenceClassification": "sequence_reward",
    "ColBERT": "token_embed",
}


@dataclass(frozen=True)
class Pooling:
    """A task in vLLM's terms."""

    task: str
    """vLLM's pooling task."""
    quantity: str
    """The kind of value in its raw output."""


POOLING: Mapping[Task, Pooling] = {
    "token_classify": Pooling("token_classify", "logit"),
    "token_reward": Pooling("token_classify", "logit"),
    "sequence_reward": Pooling("classify", "logit"),
    "token_embed": Pooling("token_embed", "embedding"),
}


def quantity_of(task: Task) -> str:
    """Return the kind of value that a measurement of this task holds."""
    return "log-prob" if task == GENERATE else POOLING[task].quantity


def is_classifier(task: Task) -> bool:
    """Whether each row of its values holds one logit per label."""
    return task in ("token_classify", "token_reward")


def task_of(config: Mapping[str, Any]) -> Task:
    """Return a checkpoint's task, from the architecture in its config.json."""
    for architecture in config.get("architectures") or ():
        for part, task in _TASK_OF_ARCHITECTURE.items():
            if part in architecture:
                return task
    return GENERATE


def head_tensors(names: Iterable[str]) -> list[str]:
    """Return the names of the tensors outside a checkpoint's body, i.e. those of its head."""
    every = list(names)
    bodies = {name.partition(".")[0] for name in every if LAYER.search(name)}
    return sorted(name for name in every if name.partition(".")[0] not in bodies)


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels of a config's `id2label`, sorted by id; () if it has none."""
    labels = config.get("id2label") or {}
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def num_labels(config: Mapping[str, Any]) -> int:
    """Return a config's number of labels; transformers' default is two."""
    return len(label_names(config)) or int(config.get("num_labels", 2))


def activation_of(config: Mapping[str, Any], labels: int) -> Literal["softmax", "sigmoid", "none"]:
    """Return the activation that turns a classifier's logits into probabilities, by its config.

    It follows `problem_type` as transformers' losses do: none for regression, sigmoid for
    multi-label classification and for a single label, softmax otherwise.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or (kind is None and labels == 1):
        return "sigmoid"
    return "softmax"

"""What a checkpoint does: generate, or pool its hidden states into labels, rewards, embeddings."""

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
# What vLLM and transformers call the linears of heads of models that pool.
HEADS = ("score", "score.0", "score.2", "classifier", "v_head")

# Parts of the names of the architectures that do nothing else, the longest of several first.
_TASK_OF_ARCHITECTURE: Mapping[str, Task] = {
    "ProcessRewardModel": "token_reward",
    "RewardModel": "token_reward",
    "ForTokenClassification": "token_classify",
    "ForSequenceClassification": "sequence_reward",
    "ColBERT": "token_embed",
}


@dataclass(frozen=True)
class Pooling:
    """What a task is for vLLM."""

    task: str
    """vLLM's pooling task."""
    quantity: str
    """What its raw output is made of."""


POOLING: Mapping[Task, Pooling] = {
    "token_classify": Pooling("token_classify", "logit"),
    "token_reward": Pooling("token_classify", "logit"),
    "sequence_reward": Pooling("classify", "logit"),
    "token_embed": Pooling("token_embed", "embedding"),
}


def quantity_of(task: Task) -> str:
    """Return what the values of a measurement are."""
    return "log-prob" if task == GENERATE else POOLING[task].quantity


def is_classifier(task: Task) -> bool:
    """Whether a row of its values holds a logit for each label."""
    return task in ("token_classify", "token_reward")


def task_of(config: Mapping[str, Any]) -> Task:
    """Return what a checkpoint's config.json says that it does, by its architecture."""
    for architecture in config.get("architectures") or ():
        for part, task in _TASK_OF_ARCHITECTURE.items():
            if part in architecture:
                return task
    return GENERATE


def head_tensors(names: Iterable[str]) -> list[str]:
    """Return the names of tensors that lie outside a checkpoint's body: those of its head."""
    every = list(names)
    bodies = {name.partition(".")[0] for name in every if LAYER.search(name)}
    return sorted(name for name in every if name.partition(".")[0] not in bodies)


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels of a config's `id2label`, in the order of their ids; () without one."""
    labels = config.get("id2label") or {}
    return tuple(str(labels[key]) for key in sorted(labels, key=int))


def num_labels(config: Mapping[str, Any]) -> int:
    """Return how many labels a config says; transformers' default is two."""
    return len(label_names(config)) or int(config.get("num_labels", 2))


def activation_of(config: Mapping[str, Any], labels: int) -> Literal["softmax", "sigmoid", "none"]:
    """Return the function that makes probabilities of a classifier's logits, by its config.

    As transformers' losses take `problem_type`: a regression has none, several labels at once are
    independent; otherwise one of the labels holds, and of a single one, whether it does.
    """
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    if kind == "multi_label_classification" or (kind is None and labels == 1):
        return "sigmoid"
    return "softmax"

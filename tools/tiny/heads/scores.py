"""Scores: what a model learned, from held-out examples."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.stats import kendalltau

from tiny.heads.examples import IGNORED, Example

Score = Callable[[Any, Sequence[Example]], dict[str, float]]


@torch.inference_mode()
def classification_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return accuracy and macro F1 of the labelled tokens."""
    found, expected = [], []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        labels = torch.tensor(example.labels)
        found.append(logits.argmax(-1)[labels != IGNORED])
        expected.append(labels[labels != IGNORED])
    predicted, true = torch.cat(found), torch.cat(expected)
    classes = [f1(predicted == label, true == label) for label in sorted(set(true.tolist()))]
    return {
        "macro_f1": sum(classes) / len(classes),
        "accuracy": (predicted == true).float().mean().item(),
        "tokens": len(true),
    }


def f1(predicted: torch.Tensor, true: torch.Tensor) -> float:
    """Return the harmonic mean of precision and recall of one class, from booleans [n]."""
    both = (predicted & true).sum().item()
    return 2 * both / max(1, predicted.sum().item() + true.sum().item())


@torch.inference_mode()
def ranking_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return how many pairs of other grades are ranked right, and Kendall's tau-b."""
    reward = torch.stack([model(input_ids=torch.tensor([e.ids])).logits[0, 0] for e in examples])
    grade = torch.tensor([e.labels[-1] for e in examples])
    pairs = grade[:, None] > grade[None, :]
    right = (reward[:, None] > reward[None, :])[pairs].float().mean().item()
    return {
        "accuracy": right,
        "kendall_tau": float(kendalltau(reward.tolist(), grade.tolist()).statistic),
        "texts": len(examples),
    }


@torch.inference_mode()
def retrieval_score(model: Any, examples: Sequence[Example]) -> dict[str, float]:
    """Return how many questions find their own story, of all the stories there are."""
    vectors = [
        torch.nn.functional.normalize(model(input_ids=torch.tensor([e.ids])).logits[0], dim=-1)
        for e in examples
    ]
    questions, stories = vectors[::2], vectors[1::2]
    scores = torch.tensor([[(q @ s.T).amax(-1).sum().item() for s in stories] for q in questions])
    found = scores.argmax(1) == torch.arange(len(scores))
    return {"accuracy": found.float().mean().item(), "questions": len(questions)}

"""Losses: a model, ids [rows, longest] and labels of the same shape → a scalar."""

from collections.abc import Callable
from typing import Any

import torch

from tiny.heads.examples import IGNORED
from tiny.tokenizer import PAD_ID

Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Of the labelled tokens; with `smoothing`, against labels that are that much uniform."""
    # Padding is behind every token that counts: a decoder needs no mask.
    logits = model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, label_smoothing=smoothing
    )


def pairwise_ranking(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """RankNet (Burges et al., 2005): -log sigmoid of the margin of each pair with other grades."""
    reward = model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits[:, 0]
    grade = labels.masked_fill(labels == IGNORED, 0).sum(dim=1)
    better = grade[:, None] > grade[None, :]
    margin = reward[:, None] - reward[None, :]
    return torch.nn.functional.softplus(-margin[better]).mean()


def in_batch_retrieval(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each question's story among all the stories of a batch, by max-sim of unit vectors."""
    mask = ids != PAD_ID
    vectors = model(input_ids=ids, attention_mask=mask.long()).logits
    unit = torch.nn.functional.normalize(vectors, dim=-1) * mask[..., None]
    similar = torch.einsum("qtd,sud->qstu", unit[::2], unit[1::2])
    scores = similar.masked_fill(~mask[None, 1::2, None, :], -1).amax(-1).sum(-1)
    return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))

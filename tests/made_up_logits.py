"""Two made-up models to compare: hidden states [rows, width] under one head."""

import numpy as np
import torch

from quantgate.measuring.divergence import Logits, Side


def linear(weight: torch.Tensor) -> Logits:
    return lambda hidden: hidden @ weight.T


def sides(
    rows: int, width: int, vocabulary: int, moved: float, seed: int = 0
) -> tuple[Side, Side, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    head = torch.randn(vocabulary, width, generator=generator) * 3 / width**0.5
    other = hidden + moved * torch.randn(rows, width, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).numpy()
    return (
        Side(hidden.numpy(), linear(head), vocabulary),
        Side(other.numpy(), linear(head), vocabulary),
        targets,
    )

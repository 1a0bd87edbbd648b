"""Tiers: how much of the gate a run asks, and how long that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Tier = Literal["quick", "standard", "full"]
TIERS: tuple[Tier, ...] = get_args(Tier)


def covers(tier: Tier, asked: Tier) -> bool:
    """Whether a run of one tier judges everything that another one asks."""
    return TIERS.index(tier) >= TIERS.index(asked)


@dataclass(frozen=True)
class RunTier:
    """How much was asked of a checkpoint, and how much must be for its release."""

    asked: Tier
    required: Tier

    @property
    def suffices(self) -> bool:
        """Whether a pass releases the checkpoint."""
        return covers(self.asked, self.required)

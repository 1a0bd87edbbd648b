"""Every rule, and the audit itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from quantgate.audit import (
    configs,
    coverage,
    layout,
    modelopt,
    safety,
    scales,
    shards,
    tokenizers,
    weights,
)
from quantgate.audit.finding import SEVERITIES, Finding, Rule
from quantgate.audit.inventory import Inventory, read_inventory
from quantgate.audit.shown import findings_of

RULES: tuple[Rule, ...] = (
    *shards.RULES,
    *coverage.RULES,
    *layout.RULES,
    *modelopt.RULES,
    *scales.RULES,
    *configs.RULES,
    *tokenizers.RULES,
    *safety.RULES,
    *weights.RULES,
)


def audit(directory: Path, base: Path | None, *, deep: bool = False) -> tuple[Finding, ...]:
    """Return what is wrong with a checkpoint, errors first; never raises for its content.

    `base` is the unquantized model it was made from: its config, tokenizer and names are compared.
    `deep` also compares every weight with the base's.
    """
    return examine(read_inventory(directory, base), deep=deep)


def examine(inventory: Inventory, *, deep: bool = False) -> tuple[Finding, ...]:
    """Return what is wrong with a checkpoint that has been read."""
    if not inventory.directory.is_dir():
        return tuple(findings_of(shards.UNREADABLE, inventory))
    needs = {"files"} | ({"base"} if inventory.base else set()) | ({"weights"} if deep else set())
    return _found(inventory, needs)


def audit_weights(directory: Path, base: Path | None) -> tuple[Finding, ...]:
    """Return what is wrong with a checkpoint's weights, compared with the base's, errors first."""
    return _found(read_inventory(directory, base), {"weights"})


def _found(inventory: Inventory, needs: set[str]) -> tuple[Finding, ...]:
    with np.errstate(all="ignore"):  # a damaged file's values may be infinite or NaN
        found = [f for rule in RULES if rule.needs in needs for f in findings_of(rule, inventory)]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))

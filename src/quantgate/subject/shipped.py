"""The suites and probes that quantgate comes with, in a checkout and in an installed package."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: str) -> Path:
    """Return the folder `name`, "suites" or "fixtures/probes", that quantgate comes with.

    A wheel has it inside the package; a checkout, installed editable or not, at its top level.
    """
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parents[1] / name

"""Turns measurements into verdicts: comparisons, limits, checks and goldens."""

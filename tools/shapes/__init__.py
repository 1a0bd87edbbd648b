"""Checkpoints with the shapes of real models and random weights, and what judging them costs."""

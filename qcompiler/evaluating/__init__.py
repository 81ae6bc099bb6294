"""Evaluation of a compiled model against its float model: how good, how fast, and where it was lost."""

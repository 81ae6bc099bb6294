"""Capability tables of the targets: data, not code."""

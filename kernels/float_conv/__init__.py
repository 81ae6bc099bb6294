"""Convolutions of floats."""

"""Products of floats."""

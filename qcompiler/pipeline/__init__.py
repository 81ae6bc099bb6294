"""Passes, pipelines, phases, and the instruments that hang on them."""

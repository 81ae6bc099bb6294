"""Triton: plan, arena, artifact and executor of models that run on the project's own kernels."""

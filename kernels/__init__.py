"""Triton kernels, each beside its NumPy reference, its contract and its table of configurations.

Importing this package loads neither triton nor torch; the modules ``triton_kernel`` and `qcompiler.kernels.proof` do.
"""

"""Numeric contracts: how far a pass may move the numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exact:
    """Bit-identical outputs."""


@dataclass(frozen=True)
class Reassociates:
    """The same real-number function in another order of operations.

    Attributes:
        rel: bound on the largest absolute difference over the largest absolute value of the tensor.
    """

    rel: float = 1e-4


@dataclass(frozen=True)
class WithinStep:
    """At most ``steps`` quantization steps at the outputs of what changed."""

    steps: int = 1


@dataclass(frozen=True)
class Lossy:
    """Changes the numbers on purpose (inserting Q/DQ, pruning); measured, not bounded."""


Contract = Exact | Reassociates | WithinStep | Lossy

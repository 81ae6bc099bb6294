"""Bring Sigmoid and SiLU into one spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.activations import SILU_RULES
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class RecognizeSilu(RewritePass):
    """Bring Sigmoid and SiLU into one spelling.

    SiLU is x * Sigmoid(x), the sigmoid as second factor.
    """

    numerics: ClassVar[Contract] = Reassociates()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.activations``."""
        return SILU_RULES

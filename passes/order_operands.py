"""Write the constant operand of Add and Mul second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.gemm import OPERAND_ORDER
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class OrderOperands(RewritePass):
    """Write the constant operand of Add and Mul second.

    Engines look for a bias or factor there.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.gemm``."""
        return OPERAND_ORDER

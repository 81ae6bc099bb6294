"""Bring Gemm into its normal form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.gemm import GEMM
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class NormalizeGemm(RewritePass):
    """Bring Gemm into its normal form.

    alpha, beta and transpositions go into constant operands, a constant C becomes a row.
    """

    numerics: ClassVar[Contract] = Reassociates()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.gemm``."""
        return GEMM

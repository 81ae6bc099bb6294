"""Take factors and offsets per channel into weights and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.affine import FACTORS
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class FoldMulAddIntoWeights(RewritePass):
    """Take factors and offsets per channel into weights and bias.

    Mul, Div, Add and Sub with constants beside Conv, ConvTranspose, Gemm and MatMul.
    """

    numerics: ClassVar[Contract] = Reassociates()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.affine``."""
        return FACTORS

"""Take BatchNormalization into weights and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.affine import BATCH_NORMS
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class FuseBatchNorm(RewritePass):
    """Take BatchNormalization into weights and bias.

    Behind Conv, ConvTranspose, Gemm and MatMul, and in front of an unpadded Conv.
    """

    numerics: ClassVar[Contract] = Reassociates()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.affine``."""
        return BATCH_NORMS

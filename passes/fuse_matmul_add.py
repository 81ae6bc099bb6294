"""Spell a rank-2 MatMul with a bias as Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.gemm import MATMUL_ADD
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class FuseMatmulAdd(RewritePass):
    """Spell a rank-2 MatMul with a bias as Gemm.

    At higher ranks MatMul and Add stay; engines fuse that form themselves.
    """

    numerics: ClassVar[Contract] = Reassociates()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.gemm``."""
        return MATMUL_ADD

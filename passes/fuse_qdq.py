"""fuse-qdq: fold Q/DQ groups into calls of the ``qcompiler`` domain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.phase import Phase
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.qdq import FUSE_RULES
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class FuseQdq(RewritePass):
    """Fold Dequantize-operator-Quantize into one fused operator whose body is the same Q/DQ form."""

    needs = Phase.QDQ
    gives = Phase.FUSED
    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return one rule per operator family."""
        return FUSE_RULES

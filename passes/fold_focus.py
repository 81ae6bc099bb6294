"""fold-focus: a convolution behind space-to-depth by slices reads the original value instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.phase import Phase
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.focus import FOCUS_RULES
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class FoldFocus(RewritePass):
    """Fold space-to-depth (strided slices and a Concat, or the operator) into the convolution behind it.

    The convolution reads the original value with a larger kernel and stride.
    The sums are the same; the slices, which copy the input one element at a time, are gone.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Reassociates(1e-5)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.focus``."""
        return FOCUS_RULES

"""fold-scales: cancel Q/DQ pairs, fold factors into scales, and move Q/DQ to where they cancel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.phase import Phase
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.scales import SCALES
from qcompiler.pipeline.contract import Contract, WithinStep


@dataclass(frozen=True)
class FoldScales(RewritePass):
    """Cancel Q/DQ pairs, fold constant factors into scales, and move integers instead of floats where pairs meet.

    Scales of int32 biases stay the product of the activation's and the weight's scale: a factor that would enter that
    product is left where it is.
    """

    needs = Phase.QDQ
    gives = Phase.QDQ
    numerics: ClassVar[Contract] = WithinStep(1)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules on Q/DQ alone."""
        return SCALES

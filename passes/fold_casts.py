"""Convert once instead of twice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.casts import CASTS
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class FoldCasts(RewritePass):
    """Convert once instead of twice.

    Two conversions in a row become one where the first keeps every value.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.casts``."""
        return CASTS

"""Change the shape once instead of several times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.reshapes import RESHAPES
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class FoldReshapes(RewritePass):
    """Change the shape once instead of several times.

    Chains of Reshape, Flatten, Squeeze and Unsqueeze become one operator, or none.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.reshapes``."""
        return RESHAPES

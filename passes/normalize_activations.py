"""Write activations in their shortest form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.activations import ACTIVATIONS
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class NormalizeActivations(RewritePass):
    """Write activations in their shortest form.

    Max with zero and Clip from zero become Relu; chains of Clip and Relu become one.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.activations``."""
        return ACTIVATIONS

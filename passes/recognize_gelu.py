"""Recognise Gelu in its spelled-out forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.activations import GELU
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class RecognizeGelu(RewritePass):
    """Recognise Gelu in its spelled-out forms.

    With Erf (exact) and with Tanh (approximate); needs opset 20.
    """

    numerics: ClassVar[Contract] = Reassociates(1e-3)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.activations``."""
        return GELU

"""Recognise LayerNormalization in its spelled-out form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.norms import NORMS
from qcompiler.pipeline.contract import Contract, Reassociates


@dataclass(frozen=True)
class RecognizeLayerNorm(RewritePass):
    """Recognise LayerNormalization in its spelled-out form.

    Over the last axis; scale and bias behind it are taken up. RMS normalization stays spelled out below opset 23.
    """

    numerics: ClassVar[Contract] = Reassociates(1e-3)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.norms``."""
        return NORMS

"""Drop operators that return their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.identities import IDENTITIES
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class EliminateIdentity(RewritePass):
    """Drop operators that return their input.

    Identity, Dropout in inference, void Cast, Reshape, Transpose, Slice, Pad, Expand, and neutral operands.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.identities``."""
        return IDENTITIES

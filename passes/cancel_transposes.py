"""Drop transposes that undo each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.transposes import TRANSPOSES
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class CancelTransposes(RewritePass):
    """Drop transposes that undo each other.

    In a row, or with elementwise operators between them.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.transposes``."""
        return TRANSPOSES

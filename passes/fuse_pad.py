"""Take explicit padding into the operator behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Rule
from qcompiler.patterns.padding import PADDING
from qcompiler.pipeline.contract import Contract, Exact


@dataclass(frozen=True)
class FusePad(RewritePass):
    """Take explicit padding into the operator behind it.

    Convolutions and average pooling pad with zeros themselves, max pooling where the padding cannot win.
    """

    numerics: ClassVar[Contract] = Exact()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of ``qcompiler.patterns.padding``."""
        return PADDING

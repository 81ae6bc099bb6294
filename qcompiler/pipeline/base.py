"""The base of every pass."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from qcompiler.ir.phase import Phase
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class Pass(ABC):
    """A named transformation of a `CompileState`; its dataclass fields are its options.

    Class attributes:
        needs: the phases the graph may be in.
        gives: the phase afterwards; None leaves it as it is.
        numerics: how far the numbers may move.
    """

    needs: ClassVar[Phase | tuple[Phase, ...]] = Phase.FLOAT
    gives: ClassVar[Phase | None] = None
    numerics: ClassVar[Contract] = Exact()

    @classmethod
    def name(cls) -> str:
        """Return the kebab-case name: ``FuseQdqMatMul`` is ``fuse-qdq-mat-mul`` unless ``pass_name`` says otherwise."""
        given = cls.__dict__.get("pass_name")
        if given is not None:
            return str(given)
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, state: CompileState) -> int:
        """Transform ``state.model`` in place and return the number of changes (0: nothing was done)."""

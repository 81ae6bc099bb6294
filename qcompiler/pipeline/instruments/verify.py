"""Verify the graph after every pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qcompiler.ir.verify import CORE_RULES, verify
from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class VerifyInstrument:
    """Check the rules of the phase behind every pass, and once in front of the first.

    Attributes:
        rules: verifier rules to hold.
    """

    rules: Sequence[Any] = CORE_RULES

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Verify what the first pass is given, so that no pass is blamed for it."""
        if step.index == 0:
            verify(state.model, state.phase, self.rules)

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Verify the graph in its new phase.

        Raises:
            VerifyError: a rule is broken; the pipeline reports it as `PassError` with the pass's name.
        """
        verify(state.model, state.phase, self.rules)

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Nothing to keep."""

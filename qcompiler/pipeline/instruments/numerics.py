"""Hold every pass to its numeric contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from qcompiler.engine import Array, Engine, Feeds
from qcompiler.errors import ModelError, PassError
from qcompiler.pipeline.contract import Contract
from qcompiler.pipeline.numerics import ValueFigure, compare_changed, run_outputs, sqnr_db
from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class PassNumerics:
    """What a pass did to the numbers.

    Attributes:
        text: the pass as a pipeline string.
        contract: what it declares.
        figures: the error at every value it computes differently, both graphs fed the same inputs.
        sqnr_db: SQNR of each model output against the model in front of the first pass (or the given reference).
        unchecked: why nothing was measured, if so.
    """

    text: str
    contract: Contract
    figures: tuple[ValueFigure, ...] = ()
    sqnr_db: dict[str, float] = field(default_factory=dict)
    unchecked: str = ""

    @property
    def violations(self) -> tuple[ValueFigure, ...]:
        """Return the values over the bound, in program order."""
        return tuple(f for f in self.figures if f.exceeded)

    @property
    def worst(self) -> ValueFigure | None:
        """Return the value nearest to its bound (for Lossy: of least SQNR), or None if nothing was compared."""
        return max(self.figures, key=lambda f: (f.excess, -f.sqnr_db), default=None)


@dataclass
class NumericsInstrument:
    """Compare the graphs before and behind every pass.

    Attributes:
        engine: runs both, its own optimizations off.
        feeds: inputs to compare on.
        strict: raise if a contract is broken; else only record.
        reference: the model that output SQNR refers to; the one in front of the first pass if None.
        results: one entry per pass that changed the graph, in order.
    """

    engine: Engine
    feeds: Sequence[Feeds]
    strict: bool = True
    reference: ir.Model | None = None
    results: list[PassNumerics] = field(default_factory=list)
    _wanted: list[dict[str, Array]] | None = None
    _before: ir.Model | None = None

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Keep the graph in front of the pass."""
        self._before = state.model.clone()
        if self._wanted is None:
            self._wanted = run_outputs(self.engine, self.reference or state.model, self.feeds)

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Measure what changed.

        Raises:
            PassError: the contract is broken, or the engine refuses the new graph; names pass, value, node and origin.
        """
        before, contract = self._before, step.value.numerics
        assert before is not None
        assert self._wanted is not None
        self._before = None
        if changes == 0:
            return
        try:
            figures = compare_changed(before, state.model, self.engine, self.feeds, contract)
            outputs = sqnr_db(self._wanted, run_outputs(self.engine, state.model, self.feeds))
        except (ModelError, KeyError) as error:
            self.results.append(PassNumerics(step.text, contract, unchecked=str(error)))
            if self.strict:
                raise PassError(f"pass {step.index + 1} ({step.text}): cannot run its result: {error}") from error
            return
        made = PassNumerics(step.text, contract, figures, outputs)
        self.results.append(made)
        if self.strict and made.violations:
            raise PassError(f"pass {step.index + 1} ({step.text}) breaks its contract {contract}: {_where(made)}")

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Nothing to keep."""
        self._before = None


def _where(made: PassNumerics) -> str:
    first = made.violations[0]
    more = len(made.violations) - 1
    origin = ", ".join(first.origins) or "none"
    return (
        f"{first.value} of {first.op_type} {first.node!r} (origin {origin}) has error {first.error:.4g}, "
        f"allowed {first.bound:.4g}" + (f", and {more} more" if more else "")
    )

"""avoid-engine-traps: rewrite what this engine is measured to run slowly into equal forms that it runs well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_ir as ir

from qcompiler.errors import PassError
from qcompiler.ir.graph import all_graphs
from qcompiler.ir.phase import Phase
from qcompiler.passes.rewrite import RewritePass
from qcompiler.patterns.language import Clause, Rule
from qcompiler.patterns.masks import EXP_UNDERFLOW, LARGEST_SPAN
from qcompiler.patterns.match import Match
from qcompiler.patterns.traps import FLOAT_WEIGHT, QUICK_GELU, TRAP_RULES
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.spec import RangeSource


@dataclass(frozen=True)
class AvoidEngineTraps(RewritePass):
    """Apply the rewrites that were decided for this engine (plan: engine-forms), and those that never lose.

    Options:
        traps: names of traps to avoid besides those the plan names, joined by ``+``.
    """

    needs = Phase.LOWERED
    gives = Phase.LOWERED
    numerics: ClassVar[Contract] = Reassociates(1e-5)
    traps: str = ""

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules that need no decision."""
        return (QUICK_GELU, FLOAT_WEIGHT)

    def run(self, state: CompileState) -> int:
        """Apply the rules and return how often they fired."""
        wanted = [name for name, what in state.plan.engine_forms.items() if what == "avoid"]
        wanted += [name for name in self.traps.split("+") if name]
        changes = super().run(state)
        for name in dict.fromkeys(wanted):
            if name not in TRAP_RULES:
                raise PassError(f"{self.name()}: unknown trap {name!r}; known: {', '.join(TRAP_RULES)}")
            changes += _Trap(trap=name, statistics=state.statistics).run(state)
        if any(n.domain == "com.microsoft" for g in all_graphs(state.model) for n in g):
            state.model.graph.opset_imports["com.microsoft"] = 1
        return changes


@dataclass(frozen=True)
class _Trap(RewritePass):
    """The rules of one trap, held back where observed ranges show that it cannot spring."""

    needs = Phase.LOWERED
    pass_name: ClassVar[str] = "avoid-engine-traps"
    trap: str = ""
    statistics: RangeSource | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules of the trap."""
        return tuple(with_ranges(TRAP_RULES[self.trap], self.trap, self.statistics))


def with_ranges(rules: Sequence[Rule], trap: str, statistics: RangeSource | None) -> list[Rule]:
    """Add the conditions on observed ranges to the rules of a trap."""

    def spread(value: ir.Value) -> float | None:
        name = str(value.name)
        if statistics is None or not statistics.observed(name):
            return None
        low, high = statistics.range(name, "min-max")
        return high - low

    def can_underflow(m: Match) -> str | None:
        found = spread(m.x if trap == "softmax-underflow" else m.sum)
        if found is None or found > EXP_UNDERFLOW:
            return None
        return f"no-underflow: the scores span {found:.0f}, too little to underflow"

    def narrow(m: Match) -> str | None:
        found = spread(m.scores)
        if found is None:
            return "never-observed: how far the scores span is not known"
        if found <= LARGEST_SPAN:
            return None
        return f"wide-scores: they span {found:.0f}, more than {LARGEST_SPAN:.0f} without the mask"

    more = {
        "softmax-underflow": (Clause("can_underflow", can_underflow),),
        "masked-softmax": (Clause("can_underflow", can_underflow), Clause("narrow_scores", narrow)),
    }.get(trap, ())
    return [replace(r, where=(*r.where, *more)) for r in rules]

"""The base of passes that consist of pattern rules."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from qcompiler.patterns.catalog import offered_rules
from qcompiler.patterns.engine import RuleRemark, apply_rules
from qcompiler.patterns.language import Rule
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass that applies `rules` until none fires; firings and near misses become remarks.

    Rules that installed packages offer for it (entry points ``qcompiler.rules``) are tried behind its own.
    """

    @property
    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """Return the rules, in the order in which they are tried at each node."""

    def run(self, state: CompileState) -> int:
        """Apply the rules and return how often they fired."""
        name = self.name()

        def note(remark: RuleRemark) -> None:
            state.remark(name, remark.node, remark.reason, remark.text, rule=remark.rule, done=remark.done)

        rules = (*self.rules, *offered_rules(name))
        report = apply_rules(state.model, rules, on_remark=note, allow=state.allow)
        for gone, value in report.stands_for:
            # The numbers of an imported model go by the names of its values.
            if (numbers := state.imported.get(gone)) is not None:
                state.imported.setdefault(value, numbers)
        return report.changes

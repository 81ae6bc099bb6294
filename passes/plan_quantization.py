"""plan-quantization: decide a form for every fusion group and derive all points from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import FORMS, Form
from qcompiler.targets.groups import Group, find_groups, left_out
from qcompiler.targets.placement import NEVER_OBSERVED, Policy, propose, resolve, unobserved


@dataclass(frozen=True)
class PlanQuantization(Pass):
    """Write the quantization plan; the graph stays as it is.

    Forms that were decided outside (`CompileState.forms`) are taken as they are; all others follow the options.

    Options:
        convolution: form of convolutions (static or float).
        matmul: form of MatMul and Gemm with constant weights (dynamic, static-float, static, weight-only or float).
        recurrent: form of LSTM (dynamic or float).
        arithmetic: whether operators between quantized ones run on integers too.
        estimator: range estimator of activations.
    """

    needs = Phase.FLOAT
    gives = Phase.PLANNED
    numerics: ClassVar[Contract] = Exact()
    convolution: str = "static"
    matmul: str = "dynamic"
    recurrent: str = "dynamic"
    arithmetic: bool = True
    estimator: str = "min-max"

    def run(self, state: CompileState) -> int:
        """Set ``state.plan`` and return the number of groups that are not float."""
        groups = find_groups(state.model, state.target)
        convolution, matmul, recurrent = map(self._form, (self.convolution, self.matmul, self.recurrent))
        policy = Policy(convolution, matmul, recurrent, self.arithmetic)
        known = {g.name for g in groups}
        decided = {name: form for name, form in state.forms.items() if name in known}
        forms = decided if len(decided) == len(known) else propose(groups, policy, decided)
        resolution = resolve(
            groups, forms, state.target, state.statistics, state.estimators, self.estimator, imported=state.imported
        )
        state.plan = replace(resolution.plan, engine_forms=dict(state.engine_forms))
        for group, code, text in resolution.refused:
            state.remark(self.name(), group, code, text)
        for value, text in resolution.replanned:
            state.remark(self.name(), value, "replanned", text, done=True)
        self._explain(state, groups)
        return sum(choice.form != "float" for choice in state.plan.choices.values())

    def _explain(self, state: CompileState, groups: Sequence[Group]) -> None:
        """Say of every group which forms it cannot have, and of every node that nothing looked at why not."""
        for group in groups:
            for form, code, text in group.refusals:
                state.remark(self.name(), group.name, code, f"{form}: {text}")
            static = next((f for f in group.legal if f not in ("dynamic", "weight-only")), None)
            # A branch that was never taken: also where whoever decided the forms left it in float already.
            if static is not None and state.plan.form(group.name) == "float" and state.statistics is not None:
                bad = unobserved(group, static, state.statistics, state.imported)
                if bad is not None:
                    state.remark(self.name(), group.name, "never-observed", NEVER_OBSERVED.format(bad))
        for node, code, text in left_out(state.model, state.target):
            state.remark(self.name(), node, code, text)

    def _form(self, text: str) -> Form:
        if text not in FORMS:
            raise PassError(f"{self.name()}: unknown form {text!r}; expected one of {', '.join(FORMS)}")
        return text

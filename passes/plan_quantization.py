"""plan-quantization: decide a form for every fusion group and derive all points from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.errors import PassError
from qcompiler.ir.phase import Phase
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import FORMS, Form
from qcompiler.targets.groups import find_groups
from qcompiler.targets.placement import Policy, propose, resolve


@dataclass(frozen=True)
class PlanQuantization(Pass):
    """Write the quantization plan; the graph stays as it is.

    Forms that were decided outside (`CompileState.forms`) are taken as they are; all others follow the options.

    Options:
        convolution: form of convolutions (static or float).
        matmul: form of MatMul and Gemm with constant weights (dynamic, static-float, static or float).
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
        for found in groups:
            for form, code, text in found.refusals:
                state.remark(self.name(), found.name, code, f"{form}: {text}")
        return sum(choice.form != "float" for choice in state.plan.choices.values())

    def _form(self, text: str) -> Form:
        if text not in FORMS:
            raise PassError(f"{self.name()}: unknown form {text!r}; expected one of {', '.join(FORMS)}")
        return text

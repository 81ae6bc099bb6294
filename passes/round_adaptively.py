"""round-adaptively: put weights in place whose integers were chosen by the error of the product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from qcompiler.ir.graph import const_array
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.arithmetic import dequantize
from qcompiler.quant.plan import Point, use_point
from qcompiler.quant.rounding import RoundedWeight
from qcompiler.quant.spec import QuantSource
from qcompiler.targets.groups import Group, find_groups

MARK = ":rounded"


@dataclass(frozen=True)
class RoundAdaptively(Pass):
    """Put the weights in ``CompileState.rounding`` in place (AdaRound, arXiv:2004.10568; GPTQ, arXiv:2210.17323).

    Such a weight holds numbers on the grid of its scale, and its scale is fixed in the plan: rounding to nearest, which
    follows, gives exactly the chosen integers. What stays float keeps its weight, and so does a group whose weight has
    another format in the plan than the one it was rounded for.
    """

    needs = Phase.PLANNED
    gives = Phase.PLANNED
    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        """Put the weights of quantized groups in place, take them out of the state, and return the changes."""
        wanted, state.rounding = state.rounding, {}
        if not wanted:
            return 0
        rewriter = Rewriter(state.model)
        for group in find_groups(state.model, state.target):
            rounded = wanted.get(group.name)
            point = state.plan.points.get(use_point(group.name, group.row.weight))
            if rounded is None or point is None or state.plan.form(group.name) == "float":
                continue
            reason = _reason(group, rounded, point)
            if reason:
                state.remark(self.name(), group.root, "other-format", reason)
            elif state.allow(self.name(), group.root):
                _put(state, rewriter, group, rounded, point)
                text = f"the weight of {group.name} is rounded by the error of its product"
                state.remark(self.name(), group.root, "rounded", text, done=True)
        return rewriter.changes


def _reason(group: Group, rounded: RoundedWeight, point: Point) -> str:
    """Return why a weight cannot be put in place, or an empty text."""
    weight = const_array(group.root.inputs[group.row.weight])
    spec, known = rounded.params.spec, point.spec
    if weight is None or weight.shape != rounded.codes.shape:
        return f"the weight of {group.name} has another shape than the one that was rounded; round it anew"
    if point.source.kind == "fixed":
        return f"the weight of {group.name} keeps the numbers of an imported model"
    if (spec.format, spec.axis, spec.symmetric, spec.block) != (known.format, known.axis, known.symmetric, known.block):
        return f"{group.name}: the plan wants {known}, the weight was rounded for {spec}"
    return ""


def _put(state: CompileState, rewriter: Rewriter, group: Group, rounded: RoundedWeight, point: Point) -> None:
    """Let a group read its rounded weight, and fix the scale in the plan."""
    index, params = group.row.weight, rounded.params
    old = group.root.inputs[index]
    assert old is not None
    on_grid = dequantize(rounded.codes, params).astype(np.float32)
    rewriter.set_input(group.root, index, rewriter.constant(on_grid, f"{str(old.name).removesuffix(MARK)}{MARK}"))
    if old.is_initializer() and not old.uses() and not old.is_graph_output() and old.graph is not None:
        del old.graph.initializers[str(old.name)]
    scale = tuple(float(x) for x in params.scale.reshape(-1))
    zero = tuple(int(z) for z in params.zero_point.reshape(-1))
    fixed = Point(replace(params.spec, pair_safe=False), QuantSource("fixed", scale=scale, zero_point=zero))
    state.plan = replace(state.plan, points={**state.plan.points, use_point(group.name, index): fixed})

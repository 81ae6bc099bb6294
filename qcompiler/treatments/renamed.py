"""Observe anew what a FLOAT pass changed and therefore renamed."""

from __future__ import annotations

from qcompiler.calibration.observe import observe
from qcompiler.observed import wanted_values
from qcompiler.passes.smooth_activations import matmul_families
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.groups import find_groups
from qcompiler.treatments.treatment import Case


def observed_anew(case: Case, state: CompileState) -> Case:
    """Return the case over a state, with statistics of the values whose names are not those of the case's graph.

    Args:
        case: before the pass.
        state: behind a pass that inserts and removes no node.
    """
    before = [str(v.name) for node in case.workshop.base.model.graph for v in node.outputs]
    after = [str(v.name) for node in state.model.graph for v in node.outputs]
    renamed = {new: old for old, new in zip(before, after, strict=True) if old != new}
    if not renamed:
        return case.over(state)
    groups = find_groups(state.model, state.target)
    wanted = [name for name in dict.fromkeys(wanted_values(state.model, groups)) if name in renamed]
    squares = [name for name in matmul_families(groups, state.model.graph) if name in renamed]
    fresh = observe(state.model, wanted, case.feeds, case.workshop.truth, squares=squares)
    kept = {name: t for name, t in case.statistics.tensors.items() if name not in renamed.values()}
    return case.over(state, {**kept, **fresh.tensors})

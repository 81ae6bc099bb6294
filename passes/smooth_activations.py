"""smooth-activations: divide an activation's channels by a scale and multiply the weights that read it by the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, consumers, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.smoothing import Float
from qcompiler.targets.groups import Group, find_groups

MARK = ":smooth"


@dataclass(frozen=True)
class SmoothActivations(Pass):
    """Apply the scales in ``CompileState.smoothing`` (SmoothQuant, arXiv:2211.10438).

    Behind a LayerNormalization that only these products read, the scale goes into its weights; elsewhere one
    multiplication per activation is inserted. The product is the same real number; only rounding differs.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Reassociates(1e-4)

    def run(self, state: CompileState) -> int:
        """Apply all scales and return the number of changes."""
        rewriter = Rewriter(state.model)
        for name, family in matmul_families(find_groups(state.model, state.target), state.model.graph).items():
            scale = state.smoothing.get(name)
            if scale is not None and len(scale) == const_rows(family[0]):
                _smooth(rewriter, family, np.asarray(scale, np.float64))
                state.remark(self.name(), family[0].root, "smoothed", f"{name} is smoothed", done=True)
        return rewriter.changes


def matmul_families(groups: Sequence[Group], graph: ir.Graph) -> dict[str, list[Group]]:
    """Return, per activation of the main graph, all MatMul and Gemm groups that read it and can run on integers."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        if is_op(group.root, "MatMul", "Gemm") and group.legal and group.root.graph is graph:
            families.setdefault(str(group.data[0].name), []).append(group)
    return families


def const_rows(group: Group) -> int:
    """Return the number of input channels of a group's weight matrix."""
    weight = const_array(group.root.inputs[1])
    return 0 if weight is None else int(weight.shape[0])


def _smooth(rewriter: Rewriter, family: Sequence[Group], scale: Float) -> None:
    value = family[0].data[0]
    roots = [g.root for g in family]
    if _fold_into_norm(rewriter, value, roots, scale):
        smoothed = value
    else:
        inverse = rewriter.constant((1.0 / scale).astype(np.float32), f"{value.name}{MARK}_scale")
        node = rewriter.node("Mul", [value, inverse], before=roots[0], origin=roots, outputs=[f"{value.name}{MARK}"])
        smoothed = node.outputs[0]
        smoothed.type, smoothed.shape = value.type, value.shape
    for group in family:
        old = group.root.inputs[1]
        weight = const_array(old)
        assert old is not None
        assert weight is not None
        wide = (weight.astype(np.float64) * scale[:, None]).astype(np.float32)
        rewriter.set_input(group.root, 1, rewriter.constant(wide, f"{old.name}{MARK}"))
        _release(old)
        rewriter.set_input(group.root, 0, smoothed)


def _fold_into_norm(
    rewriter: Rewriter,
    value: ir.Value,
    roots: Sequence[ir.Node],
    scale: Float,
) -> bool:
    """Divide a LayerNormalization's weights by the scale if only the given products read it."""
    norm = value.producer()
    if norm is None or not is_op(norm, "LayerNormalization"):
        return False
    if attr_int(norm, "axis", -1) not in (-1, len(value.shape or ()) - 1):
        return False
    if value.is_graph_output() or set(consumers(value)) != set(roots):
        return False
    weights = [const_array(v) if v is not None else None for v in norm.inputs[1:]]
    if any(w is None or w.shape != scale.shape for w in weights):
        return False
    for index, weight in enumerate(weights, start=1):
        assert weight is not None
        name = str(norm.inputs[index].name)  # type: ignore[union-attr]  # it has a weight
        rewriter.set_input(norm, index, rewriter.constant((weight / scale).astype(np.float32), f"{name}{MARK}"))
    return True


def _release(value: ir.Value) -> None:
    """Drop an initializer that nothing reads any more."""
    if value.is_initializer() and not value.uses() and not value.is_graph_output() and value.graph is not None:
        del value.graph.initializers[str(value.name)]


def changed_values(before: Mapping[str, Sequence[float]], model: ir.Model) -> list[str]:
    """Return the names of the values whose statistics smoothing made stale or created."""
    names = {str(v.name) for node in model.graph for v in node.outputs}
    return [n + MARK if n + MARK in names else n for n in before]

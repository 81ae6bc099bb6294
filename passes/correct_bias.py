"""correct-bias: add to each bias what quantization takes from the mean of its output channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.graph import const_array, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Lossy
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form, use_point
from qcompiler.targets.groups import Group, find_groups
from qcompiler.targets.points import bias_point

MARK = ":corrected"

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Apply ``CompileState.bias_corrections`` (Nagel et al. 2019, arXiv:1906.04721, section 4.2 and appendix D).

    Rounded weights and clipped activations shift the mean of a product's output channels; a bias takes the shift back
    at no cost. A correction holds for one form of one group, so it is applied to the plan: what stays float keeps its
    bias. A product without a bias gets one, as an input of its operator or as an Add behind a MatMul.
    """

    needs = Phase.PLANNED
    gives = Phase.PLANNED
    numerics: ClassVar[Contract] = Lossy()

    def run(self, state: CompileState) -> int:
        """Apply the corrections of the forms in the plan, take them out of the state, and return the changes."""
        wanted, state.bias_corrections = state.bias_corrections, {}
        if not wanted:
            return 0
        rewriter = Rewriter(state.model)
        for group in find_groups(state.model, state.target):
            correction = wanted.get(correction_key(group.name, state.plan.form(group.name)))
            if correction is None:
                continue
            if not correctable(group) or len(correction) != columns(group):
                text = f"{group.name} has no bias of {len(correction)} numbers; compute the corrections anew"
                state.remark(self.name(), group.root, "no-such-bias", text)
            elif state.allow(self.name(), group.root):
                _correct(state, rewriter, group, np.asarray(correction, np.float64))
                text = f"the bias of {group.name} takes back a shift of the mean"
                state.remark(self.name(), group.root, "corrected", text, done=True)
        return rewriter.changes


def correction_key(group: str, form: Form) -> str:
    """Return the key of a correction: forms that read the same integers share it."""
    return f"{group}@{'static' if form == 'static-float' else form}"


def correctable(group: Group) -> bool:
    """Return whether a group is a product whose bias can be changed."""
    if not is_op(group.root, "Conv", "Gemm", "MatMul") or group.row.kind != "weighted":
        return False
    bias = group.root.inputs[2] if len(group.root.inputs) > 2 else None
    return bool(columns(group)) and (bias is None or const_array(bias) is not None)


def columns(group: Group) -> int:
    """Return the number of output channels of a product, 0 if it is unknown."""
    weight = group.root.inputs[1]
    shape = () if weight is None or weight.shape is None else tuple(weight.shape)
    size = shape[0 if group.root.op_type == "Conv" else -1] if len(shape) > 1 else 0
    return size if isinstance(size, int) else 0


def _correct(state: CompileState, rewriter: Rewriter, group: Group, correction: Float) -> None:
    root = group.root
    if group.bias is not None:
        index = 0 if const_array(group.bias.inputs[0]) is not None else 1
        _add_to(rewriter, group.bias, index, correction)
    elif is_op(root, "MatMul"):
        _append(rewriter, root, correction)
    elif len(root.inputs) > 2 and root.inputs[2] is not None:
        _add_to(rewriter, root, 2, correction)
    else:
        bias = rewriter.constant(correction.astype(np.float32), f"{root.name}:bias{MARK}")
        root.resize_inputs(3)
        rewriter.set_input(root, 2, bias)
        if state.plan.form(group.name) == "static" and state.target.bias == "int32":
            weight = use_point(group.name, group.row.weight)
            points = {
                **state.plan.points,
                use_point(group.name, 2): bias_point(str(group.data[0].name), weight, state.plan.points[weight].spec),
            }
            state.plan = replace(state.plan, points=points)


def _add_to(rewriter: Rewriter, node: ir.Node, index: int, correction: Float) -> None:
    """Let a node read a bias to which a correction was added."""
    old = node.inputs[index]
    array = const_array(old)
    assert old is not None
    assert array is not None
    stem = str(old.name).removesuffix(MARK)
    made = (array.astype(np.float64) + correction).astype(np.float32)
    rewriter.set_input(node, index, rewriter.constant(made, f"{stem}{MARK}"))
    if old.is_initializer() and not old.uses() and not old.is_graph_output() and old.graph is not None:
        del old.graph.initializers[str(old.name)]


def _append(rewriter: Rewriter, root: ir.Node, correction: Float) -> None:
    """Put an Add behind a MatMul; its result takes over the name, under which the plan and the statistics know it."""
    result = root.outputs[0]
    readers = list(result.uses())
    bias = rewriter.constant(correction.astype(np.float32), f"{root.name}:bias{MARK}")
    add = rewriter.node("Add", [result, bias], after=root, origin=[root], name=f"{root.name}/Add")
    total = add.outputs[0]
    rewriter.take_over(result, total)
    if result.is_graph_output():
        rewriter.replace(result, total)
        rewriter.set_input(add, 0, result)
    else:
        for use in readers:
            rewriter.set_input(use.node, use.idx, total)

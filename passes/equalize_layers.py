"""equalize-layers: divide the channels between two layers by a scale, in the weights that give and that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channel_uses import ConstantUse, WeightUse
from qcompiler.ir.channels import ChannelClass, channel_classes
from qcompiler.ir.graph import attr_int, const_array
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState

MARK = ":equalized"

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """Apply the scales in ``CompileState.equalization`` (cross-layer equalization, arXiv:1906.04721, section 4.1).

    A channel is divided where a Conv, Gemm or MatMul gives it, and multiplied back where such an operator reads it.
    Between the two it passes Relu, LeakyRelu, PRelu, pools, movers, Concat, and the Add of residual branches, whose
    channels are all divided alike. No operator is inserted; the model computes the same function, and only rounding
    differs. Values that change get a new name, for which there are no statistics yet.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Reassociates(1e-4)

    def run(self, state: CompileState) -> int:
        """Apply all scales, take them out of the state, and return the number of changes."""
        wanted, state.equalization = state.equalization, {}
        if not wanted:
            return 0
        rewriter = Rewriter(state.model)
        classes = {c.name: c for c in channel_classes(state.model)}
        for name, numbers in wanted.items():
            found = classes.get(name)
            if found is None or len(numbers) != found.size:
                text = f"{name} has no {len(numbers)} channels that can be divided; compute the scales anew"
                state.remark(self.name(), name, "no-such-channels", text)
                continue
            if not state.allow(self.name(), found.given[0].node):
                continue
            _equalize(rewriter, found, np.asarray(numbers, np.float64))
            spread = max(numbers) / min(numbers)
            text = f"{name}: channels are divided by their scales"
            figures = {"values": float(len(found.values)), "spread": round(spread, 3)}
            state.remark(self.name(), found.given[0].node, "equalized", text, done=True, numbers=figures)
        return rewriter.changes


def _equalize(rewriter: Rewriter, found: ChannelClass, scale: Float) -> None:
    """Divide and multiply the weights of one class."""
    s = np.append(scale, 1.0)  # number -1: a channel that stays
    for use in found.given:
        _scale_weight(rewriter, use, 1.0 / s[use.ids])
        bias = use.node.inputs[2] if len(use.node.inputs) > 2 else None
        if bias is not None:
            _set(rewriter, use.node, 2, _bias(bias, 1.0 / s[use.ids]))
    for use in found.read:
        _scale_weight(rewriter, use, s[use.ids])
    for constant in found.constants:
        _divide_constant(rewriter, constant, s)
    for value, _ in found.values:
        value.name = rewriter.unique(f"{value.name}{MARK}")


def _scale_weight(rewriter: Rewriter, use: WeightUse, factor: Float) -> None:
    """Multiply a weight along one axis; a Conv with groups reads other channels in each group of its outputs."""
    weight = const_array(use.node.inputs[1])
    assert weight is not None
    groups = attr_int(use.node, "group", 1) if use.node.op_type == "Conv" and use.axis == 1 else 1
    cut = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    shape = [1] * cut.ndim
    shape[0], shape[use.axis + 1] = groups, -1
    _set(rewriter, use.node, 1, (cut * factor.reshape(shape)).reshape(weight.shape))


def _bias(bias: ir.Value, factor: Float) -> Float:
    array = const_array(bias)
    assert array is not None
    wide = array.astype(np.float64)
    return wide * (factor if array.size > 1 or factor.size == 1 else factor.reshape((1,) * (wide.ndim - 1) + (-1,)))


def _divide_constant(rewriter: Rewriter, use: ConstantUse, s: Float) -> None:
    array = const_array(use.node.inputs[use.index])
    assert array is not None
    wide = array.astype(np.float64)
    wide = wide.reshape((1,) * max(0, -use.axis - wide.ndim) + wide.shape)
    shape = [1] * wide.ndim
    shape[use.axis] = -1
    _set(rewriter, use.node, use.index, wide / s[use.ids].reshape(shape))


def _set(rewriter: Rewriter, node: ir.Node, index: int, array: Float) -> None:
    """Let a node read a new constant in place of an old one, which goes if nothing else reads it."""
    old = node.inputs[index]
    assert old is not None
    stem = str(old.name).removesuffix(MARK)
    rewriter.set_input(node, index, rewriter.constant(array.astype(np.float32), f"{stem}{MARK}"))
    if old.is_initializer() and not old.uses() and not old.is_graph_output() and old.graph is not None:
        del old.graph.initializers[str(old.name)]

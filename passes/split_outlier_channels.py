"""split-outlier-channels: give a channel with outliers twice, each time halved, and let its reader add the halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.ir.channels import ChannelClass, channel_classes
from qcompiler.ir.graph import attr_int, const_array, consumers, is_op
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Reassociates
from qcompiler.pipeline.state import CompileState

MARK = ":split"

Ids = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

_BETWEEN = ("Relu", "LeakyRelu", "Identity", "Abs", "Neg", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool")


@dataclass(frozen=True)
class SplitOutlierChannels(Pass):
    """Apply ``CompileState.splitting`` (OCS: Zhao et al. 2019, arXiv:1901.09504, section 3).

    W2[:, c] f(x_c) = W2[:, c] f(x_c / 2) + W2[:, c] f(x_c / 2) where f is positively homogeneous: the layer that gives
    channel c gives it twice, halved, and the layer that reads it reads both. Its reach falls to half, at the price of
    one more channel; nothing is inserted. A channel may be split several times.
    """

    needs = Phase.FLOAT
    gives = Phase.FLOAT
    numerics: ClassVar[Contract] = Reassociates(1e-4)

    def run(self, state: CompileState) -> int:
        """Split the channels, take them out of the state, and return the number of changes."""
        wanted, state.splitting = state.splitting, {}
        if not wanted:
            return 0
        rewriter = Rewriter(state.model)
        classes = {c.name: c for c in channel_classes(state.model)}
        for name, channels in wanted.items():
            found = classes.get(name)
            reason = "it is no class of channels" if found is None else why_not_split(found)
            if found is None or reason:
                state.remark(self.name(), name, "not-splittable", f"{name}: {reason}")
            elif not all(0 <= c < found.size + i for i, c in enumerate(channels)):
                state.remark(self.name(), name, "no-such-channels", f"{name} has {found.size} channels")
            elif state.allow(self.name(), found.given[0].node):
                _split(rewriter, found, *halved(found.size, channels))
                text = f"{name}: {len(channels)} channels are given twice, halved"
                state.remark(self.name(), found.given[0].node, "split", text, done=True)
        return rewriter.changes


def why_not_split(found: ChannelClass) -> str:
    """Return why the channels of a class cannot be split, or an empty text."""
    if len(found.given) != 1 or found.constants:
        return "several layers give these channels, or a constant is added to them"
    whole = np.arange(found.size)
    if any(not np.array_equal(lane.ids, whole) for _, lane in found.values):
        return "a value has some of the channels only"
    ends = {use.node for use in found.read}
    if any(attr_int(node, "group", 1) != 1 for node in (found.given[0].node, *ends)):
        return "a convolution in groups"
    for value, _ in found.values:
        producer = value.producer()
        if producer is not found.given[0].node and not is_op(producer, *_BETWEEN):
            return "an operator between the layers that may depend on the number of channels"
        if value.is_graph_output() or any(n not in ends and not is_op(n, *_BETWEEN) for n in consumers(value)):
            return "something besides layers with constant weights reads the channels"
    return "" if found.read else "nothing reads the channels"


def halved(size: int, channels: tuple[int, ...]) -> tuple[Ids, Float]:
    """Return (source channel, factor) of each channel behind the splits.

    Args:
        size: channels in front.
        channels: which one is split, one after another; ``size + i`` is the copy that split i made.
    """
    source, factor = list(range(size)), [1.0] * size
    for channel in channels:
        factor[channel] /= 2.0
        source.append(source[channel])
        factor.append(factor[channel])
    return np.array(source, np.int64), np.array(factor)


def _split(rewriter: Rewriter, found: ChannelClass, source: Ids, factor: Float) -> None:
    (use,) = found.given
    shape = [1] * _rank(use.node)
    shape[use.axis] = -1
    _set(rewriter, use.node, 1, np.take(_array(use.node, 1), source, use.axis) * factor.reshape(shape))
    if len(use.node.inputs) > 2 and use.node.inputs[2] is not None:
        bias = _array(use.node, 2)
        _set(rewriter, use.node, 2, (np.take(bias, source, -1) if bias.size > 1 else bias) * factor)
    for reader in found.read:
        _set(rewriter, reader.node, 1, np.take(_array(reader.node, 1), source, reader.axis))
    for value, lane in found.values:
        value.name = rewriter.unique(f"{value.name}{MARK}")
        assert value.shape is not None
        value.shape = ir.Shape([len(source) if i == lane.axis else d for i, d in enumerate(value.shape)])


def _rank(node: ir.Node) -> int:
    return _array(node, 1).ndim


def _array(node: ir.Node, index: int) -> Float:
    array = const_array(node.inputs[index])
    assert array is not None
    return array.astype(np.float64)


def _set(rewriter: Rewriter, node: ir.Node, index: int, array: Float) -> None:
    old = node.inputs[index]
    assert old is not None
    rewriter.set_input(node, index, rewriter.constant(array.astype(np.float32), f"{old.name}{MARK}"))
    if old.is_initializer() and not old.uses() and not old.is_graph_output() and old.graph is not None:
        del old.graph.initializers[str(old.name)]

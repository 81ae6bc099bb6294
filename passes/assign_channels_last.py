"""assign-channels-last: convolutions read and write NHWC, what stands between them follows, transposes stay outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, attr_int, attr_ints, attr_str, const_array, is_const, is_op, rank_of
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.kernel_nodes import arguments_of, is_kernel, kernel_node, settings_of
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, Exact
from qcompiler.pipeline.state import CompileState

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
NHWC = ":nhwc"
"""Behind the name of the value that stands for another one, its channels behind."""
_CONVS = ("int8_conv", "float_conv")
_PAIRS = ("Add", "Sub", "Mul", "Div")
_ELEMENTWISE = frozenset({"Relu", "Clip", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "LeakyRelu", "Identity"})


@dataclass(frozen=True)
class AssignChannelsLast(Pass):
    """Move the channels of images behind their places, from the first convolution of a chain to its end.

    One sweep in program order: a convolution reads its data so, transposed in front if nothing gives it that way yet;
    an operator that works on each element, place or channel alone follows as soon as all that it reads is there.
    """

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = Exact()

    def run(self, state: CompileState) -> int:
        """Rewrite every graph and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in all_graphs(state.model):
            if any(is_kernel(n, *_CONVS) for n in graph):
                _Sweep(rewriter).run(graph)
        return rewriter.changes


class _Sweep:
    """One graph's sweep.

    Attributes:
        last: values with channels behind, by the values that they stand for.
    """

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self.last: dict[ir.Value, ir.Value] = {}

    def run(self, graph: ir.Graph) -> None:
        """Visit all nodes, then drop the transposes that nothing reads."""
        for node in list(graph):
            follow = self._rule(node)
            if follow is not None:
                follow(node)
        unread = [n for n in graph if is_op(n, "Transpose") and not n.outputs[0].uses()]
        self.rewriter.erase_dead([n for n in unread if not n.outputs[0].is_graph_output()])

    def _rule(self, node: ir.Node) -> Callable[[ir.Node], None] | None:
        if is_kernel(node, *_CONVS):
            return self._kernel
        if is_op(node, "Transpose"):
            return self._transpose
        if not any(v in self.last for v in node.inputs):
            return None
        if is_kernel(node, "int8_lookup", "int8_pool"):
            return self._kernel
        if is_kernel(node, "int8_add", "int8_mul"):
            return self._pair if self._pair_follows(node) else None
        if is_op(node, "QuantizeLinear", "DequantizeLinear") and _per_tensor(node):
            return self._plain
        if is_op(node, *_ELEMENTWISE) and (
            not is_op(node, "Clip") or all(is_const(v) or v is None for v in node.inputs[1:])
        ):
            return self._plain
        if is_op(node, *_PAIRS) and all(v in self.last for v in node.inputs):
            return self._floats
        if is_op(node, "MaxPool") and node.inputs[0] in self.last and node.outputs[0].dtype is ir.DataType.INT8:
            return self._max_pool if len(node.outputs) == 1 or not node.outputs[1].uses() else None
        if is_op(node, "Concat") and attr_int(node, "axis", 0) % 4 == 1 and all(v in self.last for v in node.inputs):
            return self._concat
        if is_op(node, "Resize") and self._resizable(node):
            return self._resize
        return None

    # ---- values -------------------------------------------------------------------------------------------------

    def _moved(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Return a value with its channels behind: known, a constant turned over, or transposed here."""
        if value in self.last:
            return self.last[value]
        constant = const_array(value)
        if constant is not None:
            turned = self.rewriter.constant(np.ascontiguousarray(constant.transpose(TO_LAST)), f"{value.name}:nhwc")
            self.last[value] = turned
            return turned
        node = self.rewriter.node(
            "Transpose", [value], before=before, origin=[before], name=f"{before.name}/to_nhwc",
            attributes={"perm": TO_LAST},
        )  # fmt: skip
        self.rewriter.declare(node.outputs[0], value.dtype, _permuted(value.shape, TO_LAST))
        node.outputs[0].name = self.rewriter.unique(f"{value.name}{NHWC}")
        self.last[value] = node.outputs[0]
        return node.outputs[0]

    def _result(self, old: ir.Node, made: ir.Node) -> None:
        """Declare what a new node gives, and let readers of the old one read it transposed back."""
        was = old.outputs[0]
        self.rewriter.declare(made.outputs[0], was.dtype, _permuted(was.shape, TO_LAST))
        back = self.rewriter.node(
            "Transpose", [made.outputs[0]], before=old, origin=[old], name=f"{old.name}/to_nchw",
            attributes={"perm": TO_FIRST},
        )  # fmt: skip
        name = old.name or old.op_type
        old.name = self.rewriter.unique(f"{name}:was")
        made.name = name
        made.outputs[0].name = self.rewriter.unique(f"{was.name}{NHWC}")
        self.rewriter.take_over(was, back.outputs[0])
        self.rewriter.replace(was, back.outputs[0])
        self.rewriter.erase(old)
        self.last[back.outputs[0]] = made.outputs[0]

    # ---- operators ----------------------------------------------------------------------------------------------

    def _kernel(self, node: ir.Node) -> None:
        arguments: dict[str, ir.Value | None] = dict(arguments_of(node))
        x = arguments["x"]
        assert x is not None
        if rank_of(x) not in (4, None) and node.op_type not in _CONVS:
            return
        arguments["x"] = self._moved(x, node)
        settings = settings_of(node)
        if "layout" in settings:
            settings["layout"] = "NHWC"
        made = kernel_node(
            self.rewriter, node.op_type, arguments, settings, before=node, origin=[node], name=f"{node.name}:nhwc"
        )
        self._result(node, made)

    def _pair_follows(self, node: ir.Node) -> bool:
        found = arguments_of(node)
        operands = [found["x"], found["w"]]
        return all(rank_of(v) == 4 for v in (*operands, node.outputs[0]))

    def _pair(self, node: ir.Node) -> None:
        arguments: dict[str, ir.Value | None] = dict(arguments_of(node))
        for role in ("x", "w"):
            value = arguments[role]
            assert value is not None
            arguments[role] = self._moved(value, node)
        made = kernel_node(
            self.rewriter,
            node.op_type,
            arguments,
            settings_of(node),
            before=node,
            origin=[node],
            name=f"{node.name}:nhwc",
        )
        self._result(node, made)

    def _floats(self, node: ir.Node) -> None:
        """Let an operator on two pictures of floats, of four axes each, follow."""
        self._result(node, self._copy(node, [self.last[v] for v in node.inputs if v is not None]))

    def _plain(self, node: ir.Node) -> None:
        source = node.inputs[0]
        if source not in self.last:
            return
        made = self._copy(node, [self.last[source], *node.inputs[1:]])
        self._result(node, made)

    def _copy(self, node: ir.Node, inputs: list[ir.Value | None], drop: tuple[str, ...] = ()) -> ir.Node:
        return self.rewriter.node(
            node.op_type, inputs, before=node, origin=[node], name=f"{node.name}:nhwc",
            attributes={a.name: a for a in node.attributes.values() if a.name not in drop},
        )  # fmt: skip

    def _transpose(self, node: ir.Node) -> None:
        source, perm = node.inputs[0], attr_ints(node, "perm")
        assert source is not None
        if perm == TO_FIRST:
            self.last[node.outputs[0]] = source
        elif perm == TO_LAST and source in self.last:
            self.rewriter.replace(node.outputs[0], self.last[source])

    def _max_pool(self, node: ir.Node) -> None:
        keep = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "ceil_mode")
        settings = {k: a.value for k, a in node.attributes.items() if k in keep}
        source = node.inputs[0]
        assert source is not None
        made = kernel_node(
            self.rewriter, "int8_pool", {"x": self.last[source]}, {"op": "max", "layout": "NHWC", **settings},
            before=node, origin=[node], name=f"{node.name}:nhwc",
        )  # fmt: skip
        self._result(node, made)

    def _concat(self, node: ir.Node) -> None:
        made = self._copy(node, [self.last[v] for v in node.inputs if v is not None], ("axis",))
        made.attributes["axis"] = ir.AttrInt64("axis", 3)
        self._result(node, made)

    def _resizable(self, node: ir.Node) -> bool:
        given = [v for v in node.inputs[2:] if v is not None]
        roi = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
        no_roi = len(node.inputs) < 2 or node.inputs[1] is None or (roi is not None and roi.size == 0)
        whole = attr_ints(node, "axes") is None and attr_str(node, "keep_aspect_ratio_policy", "stretch") == "stretch"
        return node.inputs[0] in self.last and no_roi and whole and all(is_const(v) for v in given)

    def _resize(self, node: ir.Node) -> None:
        inputs: list[ir.Value | None] = [self.last[node.inputs[0]], None]  # type: ignore[index]  # asked before
        for value in node.inputs[2:]:
            array, named = const_array(value), "" if value is None else value.name
            if array is None or array.size != 4:
                inputs.append(None)
                continue
            inputs.append(self.rewriter.constant(array[list(TO_LAST)], f"{named}:nhwc"))
        self._result(node, self._copy(node, inputs))


def _per_tensor(node: ir.Node) -> bool:
    scale = const_array(node.inputs[1])
    return scale is not None and scale.size == 1 and rank_of(node.inputs[0]) == 4


def _permuted(shape: ir.Shape | None, perm: tuple[int, ...]) -> ir.Shape | None:
    return None if shape is None or len(shape) != len(perm) else ir.Shape([shape[i] for i in perm])

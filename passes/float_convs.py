"""Convolutions that stay in float, as nodes of the kernel for them: they keep the layout of those around them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import const_array, is_op, rank_of
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.conv_geometry import conv_geometry
from qcompiler.passes.kernel_nodes import kernel_node, stand_in


def lower_float_convs(rewriter: Rewriter, graph: ir.Graph) -> None:
    """Replace every Conv of float32 in one or two dimensions that is left in a graph by a node of ``float_conv``.

    Weight and bias must be constants; ConvTranspose has no kernel.
    """
    for node in list(graph):
        if not is_op(node, "Conv") or node.outputs[0].dtype is not ir.DataType.FLOAT:
            continue
        x, w, b = (*node.inputs, None)[:3]
        if x is None or w is None or const_array(w) is None or (b is not None and const_array(b) is None):
            continue
        spatial = (rank_of(w) or 0) - 2
        settings = conv_geometry(node, x, w, spatial) if spatial in (1, 2) else None
        if settings is None:
            continue
        _insert(rewriter, node, (x, w, b), settings | {"out": "float32"}, line=spatial == 1)


def _insert(
    rewriter: Rewriter,
    node: ir.Node,
    operands: tuple[ir.Value, ir.Value, ir.Value | None],
    settings: dict[str, object],
    *,
    line: bool,
) -> None:
    """Put the kernel in place of the node; a convolution of one dimension is one of two, the first of length 1."""
    x, w, b = operands
    name = str(node.name)
    if not line:
        made = kernel_node(
            rewriter, "float_conv", {"x": x, "w": w, "b": b}, settings, before=node, origin=[node], name=f"{name}:node"
        )
        stand_in(rewriter, node, made)
        return
    weight = const_array(w)
    assert weight is not None
    axis = rewriter.constant(np.asarray([2], np.int64), f"{name}:axis")
    plane = rewriter.node("Unsqueeze", [x, axis], before=node, origin=[node], name=f"{name}/Unsqueeze").outputs[0]
    rewriter.declare(plane, x.dtype, inserted(x.shape))
    arguments = {"x": plane, "w": rewriter.constant(np.expand_dims(weight, 2), f"{name}:w"), "b": b}
    made = kernel_node(
        rewriter, "float_conv", arguments, settings, before=node, origin=[node], name=f"{name}:node"
    )  # fmt: skip
    rewriter.declare(made.outputs[0], x.dtype, inserted(node.outputs[0].shape))
    back = rewriter.node("Squeeze", [made.outputs[0], axis], before=node, origin=[node], name=f"{name}/Squeeze")
    node.name = rewriter.unique(f"{name}:was")
    made.name = name
    rewriter.take_over(node.outputs[0], back.outputs[0])
    rewriter.replace(node.outputs[0], back.outputs[0])
    rewriter.erase(node)


def inserted(shape: ir.Shape | None) -> ir.Shape | None:
    """Return a shape with an axis of length 1 behind the channels."""
    return None if shape is None else ir.Shape([shape[0], shape[1], 1, *shape[2:]])

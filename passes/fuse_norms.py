"""fuse-norms: one kernel for a residual sum, the norm behind it and the quantization of its result.

Root mean square norms are recognized where they are written out (x / sqrt(mean(x * x) + epsilon) * gamma). A
QuantizeLinear or DequantizeLinear that stands alone becomes a kernel, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import (
    all_graphs,
    attr_float,
    attr_int,
    attr_ints,
    const_array,
    consumers,
    is_op,
    rank_of,
    scalar,
    single_consumer,
)
from qcompiler.ir.phase import Phase
from qcompiler.ir.rewriter import Rewriter
from qcompiler.ir.shapes import static_dim
from qcompiler.passes.kernel_nodes import FOLDED, kernel_node, scalar_params, stand_in
from qcompiler.pipeline.base import Pass
from qcompiler.pipeline.contract import Contract, WithinStep
from qcompiler.pipeline.state import CompileState

MOST_COLUMNS = 32768
"""Longest row that the kernel takes."""
_STORED = {ir.DataType.INT8: "int8", ir.DataType.FLOAT8E4M3FN: "float8e4m3fn"}
_BYTES = {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8"}
_OUT, _NORMED, _KEPT = range(3)


@dataclass(frozen=True)
class _Norm:
    """A norm over the last axis.

    Attributes:
        kind: ``layer`` or ``rms``.
        source: what is normalized.
        result: the node that gives the norm's result.
        gamma: scale [N].
        beta: shift [N], or None.
        epsilon: added to the variance.
    """

    kind: str
    source: ir.Value
    result: ir.Node
    gamma: ir.Value
    beta: ir.Value | None
    epsilon: float


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Fold norms with what stands before and behind them."""

    needs = Phase.LOWERED
    numerics: ClassVar[Contract] = WithinStep(1)

    def run(self, state: CompileState) -> int:
        """Rewrite every graph and return the number of changes."""
        rewriter = Rewriter(state.model)
        for graph in all_graphs(state.model):
            for node in list(graph):
                if node.graph is graph and (norm := _norm_at(node)) is not None:
                    _fuse(rewriter, norm)
            for node in list(graph):
                if node.graph is graph and is_op(node, "QuantizeLinear", "DequantizeLinear"):
                    _convert(rewriter, node)
        return rewriter.changes


def _norm_at(node: ir.Node) -> _Norm | None:
    """Return the norm whose result a node gives."""
    if node.outputs[0].dtype is not ir.DataType.FLOAT or not _fits(node.outputs[0]):
        return None
    if is_op(node, "LayerNormalization"):
        rank = rank_of(node.inputs[0]) or 1
        more = any(v.uses() for v in node.outputs[1:])
        beta = node.inputs[2] if len(node.inputs) > 2 else None
        if more or attr_int(node, "axis", -1) % rank != rank - 1 or node.inputs[0] is None or node.inputs[1] is None:
            return None
        if not _per_column(node.inputs[1], node) or (beta is not None and not _per_column(beta, node)):
            return None
        return _Norm("layer", node.inputs[0], node, node.inputs[1], beta, attr_float(node, "epsilon", 1e-5))
    return _written_out(node) if is_op(node, "Mul") else None


def _fits(value: ir.Value) -> bool:
    length = static_dim(value, -1)
    return length is not None and 0 < length <= MOST_COLUMNS


def _per_column(value: ir.Value, node: ir.Node) -> bool:
    array = const_array(value)
    return array is not None and array.dtype == np.float32 and array.size == static_dim(node.outputs[0], -1)


def _written_out(node: ir.Node) -> _Norm | None:
    """Match gamma * (x / sqrt(mean(x * x) + epsilon)), the quotient also as a product with the reciprocal."""
    for gamma, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
        if gamma is None or other is None or not _per_column(gamma, node) or single_consumer(other) is not node:
            continue
        for source, root in _quotients(other.producer()):
            epsilon = _mean_square(source, root)
            if source is not None and epsilon is not None:
                return _Norm("rms", source, node, gamma, None, epsilon)
    return None


def _quotients(node: ir.Node | None) -> list[tuple[ir.Value | None, ir.Value | None]]:
    """Return (a, b) for which a node may be a / b: a quotient, or a product with 1 / b."""
    if is_op(node, "Div"):
        return [(node.inputs[0], node.inputs[1])]
    found: list[tuple[ir.Value | None, ir.Value | None]] = []
    if is_op(node, "Mul"):
        for a, b in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            inverse = None if b is None else b.producer()
            if is_op(inverse, "Reciprocal"):
                found.append((a, inverse.inputs[0]))
            elif is_op(inverse, "Div") and scalar(inverse.inputs[0]) == 1.0:
                found.append((a, inverse.inputs[1]))
    return found


def _mean_square(source: ir.Value | None, root: ir.Value | None) -> float | None:
    """Return epsilon where a value is sqrt(mean(source ** 2) + epsilon) over the last axis."""
    node = None if root is None else root.producer()
    if source is None or not is_op(node, "Sqrt") or node.inputs[0] is None:
        return None
    add = node.inputs[0].producer()
    if not is_op(add, "Add"):
        return None
    first, second = add.inputs
    mean, number = (first, second) if scalar(second) is not None else (second, first)
    reduce = None if mean is None else mean.producer()
    if scalar(number) is None or not is_op(reduce, "ReduceMean") or attr_int(reduce, "keepdims", 1) != 1:
        return None
    axes = const_array(reduce.inputs[1]) if len(reduce.inputs) > 1 else attr_ints(reduce, "axes")
    rank = rank_of(source)
    if axes is None or rank is None or [int(a) % rank for a in np.asarray(axes).reshape(-1)] != [rank - 1]:
        return None
    square = reduce.inputs[0].producer() if reduce.inputs[0] is not None else None
    squared = is_op(square, "Mul") and square.inputs[0] is source and square.inputs[1] is source
    power = is_op(square, "Pow") and square.inputs[0] is source and scalar(square.inputs[1]) == 2.0
    return scalar(number) if squared or power else None


def _stores(value: ir.Value, graph: ir.Graph | ir.Function | None) -> ir.Node | None:
    """Return the first QuantizeLinear of a value that the kernel can do."""
    for node in consumers(value):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if not is_op(node, "QuantizeLinear") or node.graph is not graph or node.inputs[0] is not value:
            continue
        if node.outputs[0].dtype in _STORED and scalar_params(node.inputs[1], zero) is not None:
            return node
    return None


def _fuse(rewriter: Rewriter, norm: _Norm) -> None:
    result = norm.result
    arguments: dict[str, ir.Value | None] = {"x": norm.source, "gamma": norm.gamma, "beta": norm.beta}
    settings: dict[str, Any] = {"norm": norm.kind, "eps": norm.epsilon, "out": "float32", "scale": "none"}
    if norm.beta is not None:
        settings["beta"] = "channel"
    add = norm.source.producer()
    summed = is_op(add, "Add") and add.graph is result.graph and _equal_shapes(add)
    # In a norm that is written out two nodes read the sum: the square and the quotient.
    own = 1 if norm.kind == "layer" else 2
    keep = summed and (len(consumers(norm.source)) > own or norm.source.is_graph_output())
    if summed and add is not None:
        arguments |= {"x": add.inputs[0], "residual": add.inputs[1]}
        settings["residual"] = "keep" if keep else "add"
    out = result.outputs[0]
    quantize = _stores(out, result.graph)
    others = [n for n in consumers(out) if n is not quantize]
    if quantize is not None:
        settings |= _storing(quantize)
        if others or out.is_graph_output():
            settings["also"] = "normed"
    made = _insert(rewriter, arguments, settings, result, quantize)
    if keep:
        _hand_over(rewriter, norm.source, made.outputs[_KEPT])
    if quantize is None:
        _hand_over(rewriter, out, made.outputs[_OUT])
    else:
        _hand_over(rewriter, quantize.outputs[0], made.outputs[_OUT])
        if "also" in settings:
            rewriter.erase_dead([quantize])
            _hand_over(rewriter, out, made.outputs[_NORMED])
    rewriter.erase_dead([n for n in (quantize, result) if n is not None and n.graph is not None])


def _equal_shapes(add: ir.Node) -> bool:
    a, b = add.inputs
    if (
        a is None
        or b is None
        or a.shape is None
        or b.shape is None
        or const_array(a) is not None
        or const_array(b) is not None
    ):
        return False
    pairs = list(zip(a.shape, b.shape, strict=False))
    return len(a.shape) == len(b.shape) and all(
        x == y and (isinstance(x, int) or x.value is not None) for x, y in pairs
    )


def _storing(quantize: ir.Node) -> dict[str, Any]:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    kind = _STORED[quantize.outputs[0].dtype]  # type: ignore[index]
    found = scalar_params(quantize.inputs[1], zero if kind == "int8" else None)
    assert found is not None
    return {"out": kind, "scale": "static", "scale_number": float(found[0]), "zero": found[1]}


def _insert(
    rewriter: Rewriter,
    arguments: dict[str, ir.Value | None],
    settings: dict[str, Any],
    result: ir.Node,
    quantize: ir.Node | None,
) -> ir.Node:
    """Insert the kernel where the norm stood, under its name; outputs that nothing wants have no name."""
    name = result.name or result.op_type
    made = kernel_node(
        rewriter, "norm_quantize", arguments, settings, before=result, origin=[result], name=f"{name}:fused", outputs=3
    )
    result.name = rewriter.unique(f"{name}:was")
    made.name = name
    if quantize is not None and quantize is not result:
        made.metadata_props[FOLDED] = str(quantize.name)
    wanted = {_OUT: True, _NORMED: settings.get("also") == "normed", _KEPT: settings.get("residual") == "keep"}
    for index, value in enumerate(made.outputs):
        if not wanted[index]:
            value.name = ""
    return made


def _hand_over(rewriter: Rewriter, old: ir.Value, new: ir.Value) -> None:
    rewriter.take_over(old, new)
    rewriter.replace(old, new)


def _convert(rewriter: Rewriter, node: ir.Node) -> None:
    """Do a QuantizeLinear or DequantizeLinear that stands alone, with one scale, by a kernel of one element each."""
    source, result = node.inputs[0], node.outputs[0]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    floats, numbers = (source, result) if is_op(node, "QuantizeLinear") else (result, source)
    if source is None or floats is None or numbers is None or const_array(source) is not None:
        return
    params = scalar_params(node.inputs[1], zero if numbers.dtype in _BYTES else None)
    if params is None or floats.dtype is not ir.DataType.FLOAT:
        return
    if numbers.dtype not in _BYTES:
        _quantize_to_float8(rewriter, node)
        return
    out = _BYTES[numbers.dtype] if floats is source else "float32"
    settings: dict[str, Any] = {"op": "convert", "out": out, "a_scale": 1.0, "a_zero": 0}
    written = "out" if floats is source else "a"
    settings |= {f"{written}_scale": float(params[0]), f"{written}_zero": params[1]}
    name = f"{node.name or node.op_type}:node"
    made = kernel_node(rewriter, "pointwise", {"a": source}, settings, before=node, origin=[node], name=name)
    stand_in(rewriter, node, made)


def _quantize_to_float8(rewriter: Rewriter, node: ir.Node) -> None:
    """Round to 8-bit floats by the kernel of norms, without a norm."""
    source = node.inputs[0]
    if source is None or not is_op(node, "QuantizeLinear") or not _fits(source) or _stores(source, node.graph) is None:
        return
    if node.outputs[0].dtype not in _STORED:
        return
    made = _insert(rewriter, {"x": source}, {"norm": "none", **_storing(node)}, node, None)
    _hand_over(rewriter, node.outputs[0], made.outputs[_OUT])
    rewriter.erase(node)

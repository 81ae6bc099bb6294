"""Fusion groups: the units of choice, found in a canonical FLOAT graph by a target's table.

A group is a root operator and what an integer kernel absorbs with it: the bias Add behind a MatMul, the Relu or Clip
in front of a quantized output. Its name is the root node's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.analysis import open_graphs
from qcompiler.ir.graph import (
    all_graphs,
    attr_float,
    attr_int,
    attr_ints,
    attr_str,
    const_array,
    is_const,
    is_op,
    rank_of,
    scalar,
    shape_of,
    single_consumer,
)
from qcompiler.ir.shapes import static_dim
from qcompiler.quant.plan import Form
from qcompiler.targets.target import OpRow, Target


@dataclass(frozen=True, eq=False)
class Group:
    """One fusion group.

    Attributes:
        root: the node that computes.
        row: its capability row.
        bias: the Add behind a MatMul that carries a constant bias per column, if any.
        activation: the Relu or Clip behind it that a quantized output absorbs, if any.
        refusals: form to the reason code and sentence why this group cannot have it.
        legal: forms that this group can have besides float.
    """

    root: ir.Node
    row: OpRow
    bias: ir.Node | None
    activation: ir.Node | None
    legal: tuple[Form, ...]
    refusals: tuple[tuple[str, str, str], ...] = ()

    @property
    def name(self) -> str:
        """Return the root's name, which identifies the group in plans and decisions."""
        assert self.root.name is not None
        return self.root.name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Return the root and what it absorbs, in program order."""
        return tuple(n for n in (self.root, self.bias, self.activation) if n is not None)

    @property
    def data(self) -> tuple[ir.Value, ...]:
        """Return the activations (not constants) that an integer form reads quantized, each once."""
        found = (self.root.inputs[i] for i in self.data_indices)
        return tuple(dict.fromkeys(v for v in found if v is not None and not is_const(v)))

    @property
    def data_indices(self) -> tuple[int, ...]:
        """Return the input positions that hold quantized data, constants included."""
        indices = self.row.data or tuple(range(len(self.root.inputs)))
        return tuple(i for i in indices if i < len(self.root.inputs) and self.root.inputs[i] is not None)

    @property
    def results(self) -> tuple[ir.Value, ...]:
        """Return the values that leave the group when all of it is fused (the output after bias and activation)."""
        last = self.nodes[-1]
        return tuple(v for v in last.outputs if v.name)

    @property
    def float_result(self) -> ir.Value:
        """Return the value that leaves a form with float output (the activation stays outside)."""
        return (self.bias or self.root).outputs[0]


def find_groups(model: ir.Model, target: Target) -> tuple[Group, ...]:
    """Return every group of the target in the model, in program order, bodies of If, Loop and Scan included."""
    return tuple(group for graph in open_graphs(model) for group in _groups_of(graph, target))


def left_out(model: ir.Model, target: Target) -> Iterator[tuple[ir.Node, str, str]]:
    """Yield (node, reason code, sentence) for nodes of the target's table in graphs where nothing is quantized."""
    text = "it stands in the body of a SequenceMap, which engines unfold into a Loop under names of their own"
    inside = set(open_graphs(model))
    for graph in all_graphs(model):
        for node in graph if graph not in inside else ():
            if node.domain in ("", "ai.onnx") and target.row(node.op_type) is not None:
                yield node, "closed-body", text


def _groups_of(graph: ir.Graph, target: Target) -> Iterator[Group]:
    taken: set[ir.Node] = set()
    for node in graph:
        row = _row_of(node, target) if node.domain in ("", "ai.onnx") else None
        if row is None or node in taken:
            continue
        bias = _bias_add(node) if node.op_type == "MatMul" else None
        activation = _activation((bias or node).outputs[0], target) if row.kind == "weighted" else None
        if row.kind == "arithmetic" and node.op_type == "Add":
            activation = _activation(node.outputs[0], target)
        refusals = tuple(_refusals(node, row, target))
        barred = {form for form, _, _ in refusals}
        legal: tuple[Form, ...] = tuple(f for f in _forms(row) if f not in barred)
        group = Group(node, row, bias, activation, legal, refusals)
        taken.update(group.nodes)
        yield group


def _row_of(node: ir.Node, target: Target) -> OpRow | None:
    """Return a node's row: that of products of two activations where the weight is none."""
    row = target.row(node.op_type)
    if row is None or row.kind != "weighted" or row.weight >= len(node.inputs) or is_const(node.inputs[row.weight]):
        return row
    return target.product_row(node.op_type) or row


def _forms(row: OpRow) -> tuple[Form, ...]:
    return row.forms  # type: ignore[return-value]  # the schema's strings are the forms


def _bias_add(node: ir.Node) -> ir.Node | None:
    """Return the Add that puts a constant per column behind a MatMul, if it is all that reads the product."""
    add = single_consumer(node.outputs[0])
    if add is None or not is_op(add, "Add") or add.graph is not node.graph:
        return None
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    if not is_const(other):
        return None
    shape, weight = shape_of(other), shape_of(node.inputs[1])
    if shape is None or weight is None or len(weight) != 2 or not shape:
        return None
    rank = rank_of(node.outputs[0])
    if rank is not None and len(shape) > rank:
        return None
    return add if shape[-1] == weight[-1] and all(d == 1 for d in shape[:-1]) else None


def _activation(value: ir.Value, target: Target) -> ir.Node | None:
    """Return the Relu or Clip that a quantized output makes redundant, if it is all that reads the value."""
    node = single_consumer(value)
    if node is None or node.op_type not in target.activations or node.graph is not value.producer().graph:  # type: ignore[union-attr]
        return None
    if node.op_type == "Clip":
        low = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        if low is None or low > 0:
            return None
        if len(node.inputs) > 2 and node.inputs[2] is not None and scalar(node.inputs[2]) is None:
            return None
    return node


def _refusals(node: ir.Node, row: OpRow, target: Target) -> Iterator[tuple[str, str, str]]:
    """Yield (form, reason code, sentence) for each form the table offers but this node cannot have."""
    for form in row.forms:
        reason = _refusal(node, row, form, target)
        if reason is not None:
            yield form, *reason


def _refusal(node: ir.Node, row: OpRow, form: str, target: Target) -> tuple[str, str] | None:
    output = next((v for v in node.outputs if v.name), node.outputs[0])  # an LSTM may leave out its first output
    if output.dtype != ir.DataType.FLOAT:
        return "not-float32", f"the output is {_type(output)}; integer kernels need float32"
    if row.kind == "weighted" and row.weight < 0:
        return _product_refusal(node, row)
    if row.kind == "weighted":
        return _weighted_refusal(node, row, form) or _size_refusal(node, row) or _block_refusal(node, target)
    if row.kind == "recurrent":
        return _recurrent_refusal(node, row)
    if node.op_type == "Resize":
        return _resize_refusal(node)
    indices = node.outputs[1] if node.op_type == "MaxPool" and len(node.outputs) > 1 else None
    if indices is not None and (indices.uses() or indices.is_graph_output()):
        return "indices-used", "the indices output of MaxPool is read; the integer kernel has none"
    if node.op_type == "AveragePool" and (reason := _pool_refusal(node)) is not None:
        return reason
    if node.op_type == "Softmax":
        return None
    data = [node.inputs[i] for i in row.data if i < len(node.inputs)] if row.data else list(node.inputs)
    if all(is_const(v) for v in data if v is not None):  # also a Gather of rows from a constant table
        return "constant", "what it computes with is constant"
    if not row.constants and any(is_const(v) for v in node.inputs):
        return "constant-input", f"{node.op_type} with a constant input has no integer form here"
    if any(not _finite(v) for v in data):
        return "not-finite", "a constant it computes with holds NaN or infinity, for which there is no integer"
    return None


def _finite(value: ir.Value | None) -> bool:
    """Return whether a value is no constant, or one without NaN and infinity."""
    array = const_array(value)
    return array is None or array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _weighted_refusal(node: ir.Node, row: OpRow, form: str) -> tuple[str, str] | None:
    weight = node.inputs[row.weight] if row.weight < len(node.inputs) else None
    if weight is None or not is_const(weight):
        return "weight-not-constant", f"input {row.weight} is not a constant, so it cannot be quantized ahead of time"
    data = [node.inputs[i] for i in row.data or (0,) if i < len(node.inputs)]
    if all(is_const(v) for v in data):
        return "constant", "the data input is a constant"
    shape = shape_of(weight)
    assert shape is not None
    if node.op_type in ("MatMul", "Gemm", "Gather") and len(shape) != 2:
        return "weight-rank", f"the weight has rank {len(shape)}; integer kernels take a matrix"
    if node.op_type == "Gather" and attr_int(node, "axis", 0) != 0:
        return "gather-axis", "the table is not gathered by rows"
    if node.op_type == "Gemm" and not _plain_gemm(node):
        text = "alpha, beta or a transposition is left; canonicalize folds them where the inputs are constants"
        return "gemm-form", text
    if form != "weight-only" and 0 < row.bias < len(node.inputs) and node.inputs[row.bias] is not None:
        bias = node.inputs[row.bias]
        columns = shape[-1] if node.op_type == "Gemm" else shape[0]
        if not is_const(bias):
            return "bias-not-constant", "the bias is not a constant"
        array = const_array(bias)
        if array is not None and (array.ndim == 0 or array.shape[-1] != columns or array.size != columns):
            return "bias-shape", f"the bias has shape {array.shape}, not one number per output channel"
    return None


def _product_refusal(node: ir.Node, row: OpRow) -> tuple[str, str] | None:
    """Return why a product of two activations stays in float, or None."""
    ranks = [rank_of(v) for v in node.inputs[:2]]
    if any(rank is None or rank < 2 for rank in ranks):
        return "rank", f"the operands have the ranks {ranks}; the integer kernel multiplies matrices"
    if any(not _finite(v) for v in node.inputs):
        return "not-finite", "a constant it computes with holds NaN or infinity, for which there is no integer"
    lengths = (static_dim(node.inputs[0], -1), static_dim(node.inputs[1], -2))
    reduced = next((n for n in lengths if n is not None), None)
    if reduced is not None and reduced < row.min_reduce:
        return "too-small", f"each output sums {reduced} products, below {row.min_reduce} integers cannot win"
    return None


def _size_refusal(node: ir.Node, row: OpRow) -> tuple[str, str] | None:
    """Return why the sizes of a weighted operator keep it in float, or None."""
    reduced, columns = reduce_length(node), output_columns(node)
    if reduced is not None and reduced < row.min_reduce:
        return "too-small", f"each output sums {reduced} products, below {row.min_reduce} integers cannot win"
    if columns is not None and columns < row.min_columns:
        return "too-few-columns", f"the weight has {columns} output columns, below {row.min_columns} it cannot win"
    if row.multiple_of and not all(n is None or n % row.multiple_of == 0 for n in (reduced, columns)):
        text = f"the weight reduces {reduced} and gives {columns}; the kernel needs multiples of {row.multiple_of}"
        return "not-multiple", text
    return None


def _block_refusal(node: ir.Node, target: Target) -> tuple[str, str] | None:
    """Return why the weight cannot be cut into the target's blocks, or None."""
    if not target.block:
        return None
    axis = block_axis(node)
    if axis is None:
        return "block-form", f"{node.op_type} has no weight in blocks; its kernels take one scale per channel"
    if block_of(target, node) is not None:
        return None
    sizes = ", ".join(map(str, dict.fromkeys((target.block, *target.blocks))))
    return "block-size", f"the weight has {reduce_length(node)} numbers along K, which blocks of {sizes} do not divide"


def block_axis(node: ir.Node) -> int | None:
    """Return the axis of a weight along which blocks lie (K of a product, the rows of a table), None if it has none."""
    return {"MatMul": 0, "Gemm": 0, "Gather": 1}.get(node.op_type)


def block_of(target: Target, node: ir.Node) -> int | None:
    """Return the block size that a node's weight takes: the target's, or the first of its others that divides K.

    Returns None if the target has no blocks, or none that divides K.
    """
    length = reduce_length(node)
    if not target.block or length is None or block_axis(node) is None:
        return None
    others = (b for b in target.blocks if b < target.block)
    return next((b for b in (target.block, *others) if b and length % b == 0), None)


def output_columns(node: ir.Node) -> int | None:
    """Return how many channels or columns a weighted operator gives, or None if unknown."""
    shape = shape_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if not shape or node.op_type not in ("Conv", "MatMul", "Gemm"):
        return None
    columns = shape[0] if node.op_type == "Conv" else shape[-1]
    return columns if isinstance(columns, int) else None


def _type(value: ir.Value) -> str:
    return "of unknown type" if value.dtype is None else value.dtype.name.lower()


def _plain_gemm(node: ir.Node) -> bool:
    return (
        attr_float(node, "alpha", 1.0) == 1.0
        and attr_float(node, "beta", 1.0) == 1.0
        and attr_int(node, "transA", 0) == 0
        and attr_int(node, "transB", 0) == 0
    )


def _recurrent_refusal(node: ir.Node, row: OpRow) -> tuple[str, str] | None:
    for index in (1, 2):
        if not is_const(node.inputs[index]):
            return "weight-not-constant", f"input {index} is not a constant, so it cannot be quantized ahead of time"
    if attr_int(node, "layout", 0) != 0:
        return "layout", "the integer kernel has layout 0 only"
    if len(node.inputs) > 7 and node.inputs[7] is not None and not is_const(node.inputs[7]):
        return "peephole", "the peephole weights are not constant"
    return None


def _pool_refusal(node: ir.Node) -> tuple[str, str] | None:
    if any(d != 1 for d in attr_ints(node, "dilations") or ()):
        return "dilations", "the integer kernel of AveragePool has no dilations"
    if attr_int(node, "ceil_mode", 0) and attr_int(node, "count_include_pad", 0):
        # Seen on ONNX Runtime 1.31: its integer kernel divides by the whole window where ceil_mode cuts it short.
        return "ceil-mode", "with ceil_mode and count_include_pad the integer kernel counts room that is no padding"
    return None


def _resize_refusal(node: ir.Node) -> tuple[str, str] | None:
    mode = attr_str(node, "mode", "nearest")
    if mode != "nearest":
        return "resize-mode", f"{mode} interpolation computes; only nearest selects integers"
    if attr_str(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return "resize-mode", "tf_crop_and_resize may write an extrapolation value"
    return None


def reduce_length(node: ir.Node) -> int | None:
    """Return how many products one output element of Conv, MatMul or Gemm sums, or None if unknown.

    Of a Gather it is the length of a row.
    """
    weight = 0 if node.op_type == "Gather" else 1
    shape = shape_of(node.inputs[weight]) if len(node.inputs) > 1 else None
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    sizes = [d for d in shape if isinstance(d, int)]
    if node.op_type == "Conv":
        return int(np.prod(sizes[1:]))
    if node.op_type == "Gather":
        return sizes[-1] if sizes else None
    if node.op_type in ("MatMul", "Gemm") and len(sizes) >= 2:
        return sizes[-2]
    return None

"""Types and shapes: inference over a whole model, input shapes fixed by the user, and small questions about sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_graphs, shape_of

SMALL_TENSOR_BYTES = 1024
"""Constants up to this size keep their contents for shape inference, which reads shapes, axes and repeats."""


def static_dim(value: ir.Value | None, axis: int) -> int | None:
    """Return the length of one axis (negative counts from the end), or None if unknown or symbolic."""
    shape = shape_of(value)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    dim = shape[axis]
    return dim if isinstance(dim, int) else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return the shape if every axis is known, else None."""
    shape = shape_of(value)
    if shape is None or not all(isinstance(d, int) for d in shape):
        return None
    return tuple(d for d in shape if isinstance(d, int))


def element_count(value: ir.Value | None, symbol: int | None = None) -> int | None:
    """Return the number of elements.

    Args:
        value: the value asked about.
        symbol: length taken for every symbolic or unknown axis; None makes such a shape's count unknown.
    """
    shape = shape_of(value)
    if shape is None:
        return None
    dims = [d if isinstance(d, int) else symbol for d in shape]
    return None if any(d is None for d in dims) else math.prod(d for d in dims if d is not None)


@contextmanager
def hollow_weights(model: ir.Model) -> Iterator[None]:
    """Take the contents of large initializers away for the time of the block; types and shapes stay.

    ONNX's C++ tools take one serialized protobuf, which cannot exceed 2 GB, and read the contents of small tensors
    only.
    """
    taken: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for graph in all_graphs(model):
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes <= SMALL_TENSOR_BYTES:
                    continue
                proto = onnx.TensorProto(name=value.name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
                taken.append((value, tensor))
                value.const_value = ir.serde.TensorProtoTensor(proto)
        yield
    finally:
        for value, tensor in taken:
            value.const_value = tensor


def infer_shapes(model: ir.Model, *, trust: bool = True) -> int:
    """Infer types and shapes in place with ONNX's inference, data propagation on, and return how many values gained.

    Weights are not serialized, so the size of the model does not matter. A model that inference rejects is left as it
    is: unknown shapes are legal everywhere.

    Args:
        model: the graph; subgraphs are inferred, local functions are looked through.
        trust: known shapes feed the inference and win where it disagrees. False infers from inputs and constants
            alone, and keeps the known ones only for what inference leaves open (a file's own notes may be stale).
    """
    with hollow_weights(model):
        proto = ir.serde.serialize_model(model)
    if not trust:
        _drop_value_info(proto.graph)
    inferred = _run_inference(proto)
    return 0 if inferred is None else _merge_graph(model.graph, inferred.graph, trust)


def _run_inference(proto: onnx.ModelProto) -> onnx.ModelProto | None:
    for propagate in (True, False):
        try:
            return onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=propagate)
        except Exception:  # the binding raises several unrelated types
            continue
    return None


def _subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, int, onnx.GraphProto]]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.name, 0, attribute.g
        for index, graph in enumerate(attribute.graphs):
            yield attribute.name, index, graph


def _drop_value_info(graph: onnx.GraphProto) -> None:
    del graph.value_info[:]
    for node in graph.node:
        for _, _, body in _subgraphs(node):
            _drop_value_info(body)


def _merge_graph(graph: ir.Graph, inferred: onnx.GraphProto, trust: bool) -> int:
    values = {v.name: v for node in graph for v in node.outputs if v.name}
    gained = 0
    for info in (*inferred.value_info, *inferred.output):
        value = values.get(info.name)
        if value is not None and info.HasField("type"):
            gained += _merge_value(value, info.type, trust)
    for node, proto in zip(graph, inferred.node, strict=True):
        for name, index, body in _subgraphs(proto):
            attribute = node.attributes[name]
            single = attribute.type == ir.AttributeType.GRAPH
            gained += _merge_graph(attribute.as_graph() if single else attribute.as_graphs()[index], body, trust)
    return gained


def _merge_value(value: ir.Value, proto: onnx.TypeProto, trust: bool) -> int:
    before = (value.type, shape_of(value))
    found = ir.serde.deserialize_type_proto_for_type(proto)
    if found is not None and (value.type is None or not trust):
        value.type = found
    shape = ir.serde.deserialize_type_proto_for_shape(proto)
    value.shape = merge_shapes(value.shape, shape, trust)
    return int((value.type, shape_of(value)) != before)


def merge_shapes(known: ir.Shape | None, found: ir.Shape | None, trust: bool) -> ir.Shape | None:
    """Return the better known of two shapes axis by axis; ``trust`` lets the first win where both are numbers.

    Names that inference made up (``unk__0``) say nothing, and two runs may use one name for two lengths: they go.
    """
    if found is None or (known is not None and len(known) != len(found) and trust):
        return known
    if known is None or len(known) != len(found):
        return ir.Shape([_dim(d) for d in found])
    first, second = (known, found) if trust else (found, known)
    merged: list[int | str | None] = []
    for a, b in zip(first, second, strict=True):
        options = [d for d in (_dim(a), _dim(b)) if d is not None]
        numbers = [d for d in options if isinstance(d, int)]
        merged.append(numbers[0] if numbers else options[0] if options else None)
    return ir.Shape(merged)


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None or dim.value.startswith("unk__") else dim.value


def describe_inputs(model: ir.Model) -> str:
    """Return the model's inputs as one line of text, for errors."""
    return ", ".join(f"{v.name}: {_shape_text(shape_of(v))}" for v in model.graph.inputs) or "none"


def _shape_text(shape: Sequence[int | str | None] | None) -> str:
    return "any shape" if shape is None else "x".join("?" if d is None else str(d) for d in shape) or "scalar"


def fix_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> None:
    """Fix the shapes of inputs in place; a symbolic axis gets its number wherever its name appears.

    Args:
        model: the graph.
        shapes: input name to lengths; -1 leaves an axis as it is.

    Raises:
        ModelError: no such input, another rank, a fixed axis of another length, or one name with two lengths.
    """
    inputs = {v.name: v for v in model.graph.inputs}
    symbols: dict[str, int] = {}
    for name, wanted in shapes.items():
        if name not in inputs:
            raise ModelError(f"no input named {name!r} to fix the shape of; inputs are {describe_inputs(model)}")
        _fix_input(model, inputs[name], wanted, symbols)
    if symbols:
        _bind_symbols(model, symbols)


def _fix_input(model: ir.Model, value: ir.Value, wanted: Sequence[int], symbols: dict[str, int]) -> None:
    shape = shape_of(value)
    text = _shape_text(list(wanted))
    if any(d < -1 for d in wanted):
        raise ModelError(f"input {value.name!r}: a length in {text} is negative; use -1 to leave an axis open")
    if shape is None:
        value.shape = ir.Shape([None if d == -1 else d for d in wanted])
        return
    if len(shape) != len(wanted):
        raise ModelError(
            f"input {value.name!r}: expected rank {len(shape)}, found {text}; inputs are {describe_inputs(model)}"
        )
    fixed: list[int | str | None] = []
    for old, new in zip(shape, wanted, strict=True):
        if new == -1:
            fixed.append(old)
            continue
        if isinstance(old, int) and old != new:
            raise ModelError(
                f"input {value.name!r}: expected {_shape_text(shape)}, found {text}; the model fixes that axis"
            )
        if isinstance(old, str) and symbols.setdefault(old, new) != new:
            raise ModelError(f"axis {old!r} is given two lengths, {symbols[old]} and {new} (input {value.name!r})")
        fixed.append(new)
    value.shape = ir.Shape(fixed)


def _bind_symbols(model: ir.Model, symbols: Mapping[str, int]) -> None:
    for graph in all_graphs(model):
        for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
            shape = shape_of(value)
            if shape is not None and any(isinstance(d, str) and d in symbols for d in shape):
                value.shape = ir.Shape([symbols.get(d, d) if isinstance(d, str) else d for d in shape])

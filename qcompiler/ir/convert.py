"""Raise a model's operator set, node by node, with ONNX's converter.

ONNX's C++ converter takes whole models, drops what its own graph cannot hold (metadata, functions, non-tensor types)
and needs all weights in one protobuf. So it is given one node at a time, wrapped in a model of its own, and only the
nodes whose definition really changed on the way. Bodies of If, Loop and Scan are converted with the same step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import defs, version_converter

from qcompiler.errors import ModelError
from qcompiler.ir.constants import lift_constants
from qcompiler.ir.graph import all_nodes, const_array
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.schemas import (
    INTERNAL_OPSET,
    LEAST_LOWERED,
    MEANING_CHANGED,
    NOTE,
    OLDEST_OPSET,
    onnx_opset,
    schema_of,
)
from qcompiler.ir.shapes import SMALL_TENSOR_BYTES

_NEEDS_CONVERTER = frozenset({("Split", 18), ("Resize", 11)})
"""Versions that look like mere additions, but ask for an attribute that stands for the old meaning."""


def _versions(op_type: str, low: int, high: int) -> list[defs.OpSchema]:
    """Return the definitions in force from ``low`` to ``high``, oldest first."""
    found: dict[int, defs.OpSchema] = {}
    for opset in range(low, high + 1):
        schema = schema_of(op_type, opset)
        if schema is not None:
            found[schema.since_version] = schema
    return [found[v] for v in sorted(found)]


def _still_fits(node: ir.Node, low: int, high: int) -> bool:
    """Return whether every version on the way up only adds: types, optional inputs, attributes the node leaves out."""
    chain = _versions(node.op_type, low, high)
    return bool(chain) and all(_only_adds(node, a, b) for a, b in itertools.pairwise(chain))


def _only_adds(node: ir.Node, older: defs.OpSchema, newer: defs.OpSchema) -> bool:
    change = (node.op_type, newer.since_version)
    if newer.deprecated or change in MEANING_CHANGED or change in _NEEDS_CONVERTER:
        return False
    if change == ("BatchNormalization", 14) and len(node.outputs) > 1:
        return False  # older versions train when their statistics are read
    kept = all(
        name in newer.attributes
        and newer.attributes[name].type == known.type
        and newer.attributes[name].default_value == known.default_value
        for name, known in older.attributes.items()
    )
    extra = [a for name, a in newer.attributes.items() if name not in older.attributes]
    return (
        kept
        and not any(a.required for a in extra)
        and newer.min_input <= len(node.inputs) <= newer.max_input
        and newer.min_output <= len(node.outputs) <= newer.max_output
    )


@dataclass(frozen=True)
class _Replacement:
    """What one node becomes in a newer operator set."""

    node: ir.Node
    model: onnx.ModelProto


class _NoConversionError(Exception):
    """One node has no conversion."""


def convert_opset(model: ir.Model, target: int = INTERNAL_OPSET, *, lift: bool = True) -> None:
    """Raise the ONNX operator set in place, as far towards ``target`` as every node can go.

    Shapes should have been inferred before: some conversions need ranks. A model that stops short says why in its
    metadata (`NOTE`).

    Args:
        model: the graph; local functions are left as they are.
        target: the operator set wanted.
        lift: turn the constants that conversion makes into initializers (a function's body cannot have any).

    Raises:
        ModelError: the model is older than the oldest supported operator set and cannot be raised to it.
    """
    source = onnx_opset(model)
    if source >= target:
        return
    if not any(node.domain == "" for node in all_nodes(model)):
        model.opset_imports[""] = target
        return
    why = ""
    for goal in range(target, source, -1):
        try:
            plan = [r for node in all_nodes(model) if (r := _convert_node(node, source, goal)) is not None]
        except _NoConversionError as error:
            why = why or str(error)
            continue
        if goal < OLDEST_OPSET:
            break
        for replacement in plan:
            _splice(replacement)
        model.opset_imports[""] = goal
        if lift:
            lift_constants(model)
        make_names_unique(model)
        if goal < target:
            model.metadata_props[NOTE] = f"kept at opset {goal}: {why}"
        return
    if source < OLDEST_OPSET:
        raise ModelError(
            f"opset {source} is older than {OLDEST_OPSET} and cannot be converted: {why}; export the model "
            f"again with opset {LEAST_LOWERED} or newer"
        )
    model.metadata_props[NOTE] = f"kept at opset {source}: {why}"


def _convert_node(node: ir.Node, source: int, target: int) -> _Replacement | None:
    """Return what a node becomes, or None if it stays as it is."""
    if node.domain != "" or node.op_type == "Constant" or _still_fits(node, source, target):
        return None
    schema = schema_of(node.op_type, target)
    if schema is not None and schema.since_version <= source and not schema.deprecated:
        return None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise _NoConversionError(f"{node.op_type} {node.name!r} has no conversion from opset {source}")
    # The converter knows that Softmax and LogSoftmax of opset 12 flatten, and forgets that Hardmax does the same.
    flattens = node.op_type == "Hardmax" and source < 13 <= target
    wrapped = _wrap(node, source)
    if flattens:
        wrapped.graph.node[0].op_type = "Softmax"
    try:
        converted = version_converter.convert_version(wrapped, target)
    except Exception as error:  # the binding raises several unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rpartition("failed: ")[2]
        raise _NoConversionError(f"{node.op_type} {node.name!r} to opset {target}: {reason}") from error
    made = converted.graph.node
    for part in made:
        if flattens and part.op_type == "Softmax":
            part.op_type = "Hardmax"
    if any((s := schema_of(n.op_type, target)) is None or s.deprecated for n in made):
        raise _NoConversionError(f"{node.op_type} {node.name!r} has no conversion to opset {target}")
    if source < 11 and node.op_type in ("Resize", "Upsample"):
        _keep_resize_grid(node, converted.graph)
    return _Replacement(node, converted)


def _keep_resize_grid(node: ir.Node, graph: onnx.GraphProto) -> None:
    """Say what Resize-10 and Upsample meant without saying it; the converter leaves opset 11's other defaults.

    Their output x reads input x / scale: ``asymmetric``, and nearest rounds down on the way up, up on the way down.
    """
    scales = _old_scales(node)
    shrinks = scales is not None and min(scales) < 1
    if shrinks and scales is not None and max(scales) > 1:
        raise _NoConversionError(f"{node.op_type} {node.name!r} grows one axis and shrinks another")
    for made in graph.node:
        if made.op_type != "Resize":
            continue
        made.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        mode = next((a.s for a in made.attribute if a.name == "mode"), b"nearest")
        if mode == b"nearest":
            made.attribute.append(onnx.helper.make_attribute("nearest_mode", "ceil" if shrinks else "floor"))
        if len(made.input) > 1 and made.input[1]:  # a region of interest that only tf_crop_and_resize reads
            unused = made.input[1]
            made.input[1] = ""
            dead = [n for n in graph.node if unused in n.output]
            for other in dead:
                graph.node.remove(other)


def _old_scales(node: ir.Node) -> tuple[float, ...] | None:
    if "scales" in node.attributes:
        return tuple(node.attributes["scales"].as_floats())
    array = const_array(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if array is None else tuple(float(x) for x in array)


def _wrap(node: ir.Node, opset: int) -> onnx.ModelProto:
    """Return a model of one node: inputs ``i0``.. (small constants keep their contents), outputs ``o0``.. ."""
    proto = ir.serde.serialize_node(node)
    del proto.input[:], proto.output[:], proto.metadata_props[:]
    graph = onnx.GraphProto(name="one")
    names: dict[ir.Value, str] = {}
    for value in node.inputs:
        if value is None:
            proto.input.append("")
            continue
        if value not in names:
            names[value] = f"i{len(names)}"
            _declare_input(graph, value, names[value])
        proto.input.append(names[value])
    for index, value in enumerate(node.outputs):
        proto.output.append(f"o{index}")
        _declare(graph.output.add(), value, f"o{index}")
    graph.node.append(proto)
    return onnx.ModelProto(ir_version=10, graph=graph, opset_import=[onnx.OperatorSetIdProto(domain="", version=opset)])


def _declare_input(graph: onnx.GraphProto, value: ir.Value, name: str) -> None:
    _declare(graph.input.add(), value, name)
    plain = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.DOUBLE)
    if value.dtype not in plain or value.const_value is None or value.const_value.nbytes > SMALL_TENSOR_BYTES:
        return
    array = const_array(value)
    if array is not None:
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))


def _declare(info: onnx.ValueInfoProto, value: ir.Value, name: str) -> None:
    # An output without a type gets its producer's guess; an unknown type is left out rather than invented.
    info.name = name
    if value.dtype is None or not isinstance(value.type, ir.TensorType):
        return
    tensor = info.type.tensor_type
    tensor.elem_type = int(value.dtype)
    if value.shape is not None:
        tensor.shape.SetInParent()
        for dim in value.shape:
            made = tensor.shape.dim.add()
            if isinstance(dim, int):
                made.dim_value = dim
            elif dim.value:
                made.dim_param = dim.value


def _splice(replacement: _Replacement) -> None:
    """Put the converted nodes in place of the old one; names of the outputs stay."""
    node = replacement.node
    graph = node.graph
    assert graph is not None
    part = ir.serde.deserialize_model(replacement.model).graph
    inputs = list(dict.fromkeys(v for v in node.inputs if v is not None))
    outside = {f"i{index}": value for index, value in enumerate(inputs)}
    results = {v.name: v for v in part.outputs}
    fresh = list(part)
    for made in fresh:
        for index, value in enumerate(made.inputs):
            if value is not None and value.name in outside:
                made.replace_input_with(index, outside[value.name])
            elif value is not None and value.is_initializer():
                made.replace_input_with(index, _adopt(graph, value, node))
    new_outputs = [results[f"o{index}"] for index in range(len(node.outputs))]
    part.outputs.clear()
    part.remove(fresh)
    _label(fresh, node, new_outputs)
    ir.convenience.replace_nodes_and_values(graph, node, [node], fresh, node.outputs, new_outputs)


def _adopt(graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
    """Return a new initializer of ``graph`` with the contents of a converted model's initializer."""
    assert value.const_value is not None
    name, count = f"{node.name}:{value.name}", 1
    while name in graph.initializers:
        count += 1
        name = f"{node.name}:{value.name}_{count}"
    tensor = ir.Tensor(value.const_value.numpy(), dtype=value.const_value.dtype, name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(made)
    return made


def _label(fresh: Iterable[ir.Node], node: ir.Node, outputs: list[ir.Value]) -> None:
    main = node.name or node.op_type
    nodes = list(fresh)
    heir = next((n for n in nodes if n.op_type == node.op_type), nodes[-1])
    for made in nodes:
        made.name = main if made is heir else f"{main}/{made.op_type}"
        made.metadata_props.update(node.metadata_props)
        for index, value in enumerate(made.outputs):
            if value in outputs:
                continue
            # The converter notes shapes of its own intermediates, and wrong ones: inference finds them again.
            value.shape = None
            if value.name:
                value.name = f"{made.name}:out{index}"

"""Operator-set versions: raise a model node by node with ONNX's converter, and lower it where nothing changed.

ONNX's C++ converter takes whole models, drops what its own graph cannot hold (metadata, functions, non-tensor types) and
needs all weights in one protobuf. So it is given one node at a time, wrapped in a model of its own, and only the nodes whose
definition really changed on the way. Bodies of If, Loop and Scan are converted with the same step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import defs, version_converter

from qcompiler.errors import ModelError
from qcompiler.ir.graph import all_nodes, attr_int, const_array
from qcompiler.ir.shapes import SMALL_TENSOR_BYTES

INTERNAL_OPSET = 21
"""The ONNX operator set that the compiler works in; a newer model keeps its own."""

OLDEST_OPSET = 7
"""The oldest operator set the compiler works in when a model cannot be raised further."""

LEAST_LOWERED = 13
"""The oldest operator set that a model is lowered to: below it QuantizeLinear has no axis."""

NOTE = "qcompiler.opset"
"""Metadata key of a model that stayed below the internal operator set, and why."""

_MEANING_CHANGED = frozenset({("GroupNormalization", 21), ("GridSample", 20), ("Scan", 9)})
"""Versions whose signature alone does not show that the operator means something else."""


def onnx_opset(model: ir.Model) -> int:
    """Return the version of the ONNX operator set, or 0 if the model imports none."""
    return model.opset_imports.get("", 0)


def schema_of(op_type: str, opset: int, domain: str = "") -> defs.OpSchema | None:
    """Return an operator's definition in an operator set, or None if it has none there."""
    try:
        return defs.get_schema(op_type, opset, domain)
    except defs.SchemaError:
        return None


def _signature(schema: defs.OpSchema) -> tuple[object, ...]:
    attributes = {
        name: (a.type, a.required, a.default_value.SerializeToString()) for name, a in schema.attributes.items()
    }
    inputs = [(p.name, p.option) for p in schema.inputs]
    return attributes, inputs, [(p.name, p.option) for p in schema.outputs]


def _versions(op_type: str, low: int, high: int) -> list[defs.OpSchema]:
    """Return the definitions in force from ``low`` to ``high``, oldest first."""
    found: dict[int, defs.OpSchema] = {}
    for opset in range(low, high + 1):
        schema = schema_of(op_type, opset)
        if schema is not None:
            found[schema.since_version] = schema
    return [found[v] for v in sorted(found)]


def _only_widened(op_type: str, low: int, high: int) -> bool:
    """Return whether all versions on the way up have one signature: they only accept more types."""
    chain = _versions(op_type, low, high)
    return bool(chain) and all(
        _signature(a) == _signature(b) and not b.deprecated and (op_type, b.since_version) not in _MEANING_CHANGED
        for a, b in zip(chain, chain[1:], strict=False)
    )


@dataclass(frozen=True)
class _Replacement:
    """What one node becomes in a newer operator set."""

    node: ir.Node
    model: onnx.ModelProto


class _NoConversionError(Exception):
    """One node has no conversion."""


def convert_opset(model: ir.Model, target: int = INTERNAL_OPSET) -> None:
    """Raise the ONNX operator set in place, as far towards ``target`` as every node can go.

    Shapes should have been inferred before: some conversions need ranks. A model that stops short says why in its metadata
    (`NOTE`).

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
        if goal < target:
            model.metadata_props[NOTE] = f"kept at opset {goal}: {why}"
        return
    if source < OLDEST_OPSET:
        raise ModelError(
            f"opset {source} is older than {OLDEST_OPSET} and cannot be converted: {why}; export the model again, or raise "
            "it with onnx.version_converter"
        )
    model.metadata_props[NOTE] = f"kept at opset {source}: {why}"


def _convert_node(node: ir.Node, source: int, target: int) -> _Replacement | None:
    """Return what a node becomes, or None if it stays as it is."""
    if node.domain != "" or node.op_type == "Constant" or _only_widened(node.op_type, source, target):
        return None
    schema = schema_of(node.op_type, target)
    if schema is not None and schema.since_version <= source and not schema.deprecated:
        return None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise _NoConversionError(f"{node.op_type} {node.name!r} has no conversion from opset {source}")
    try:
        converted = version_converter.convert_version(_wrap(node, source), target)
    except Exception as error:  # the binding raises several unrelated types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rpartition("failed: ")[2]
        raise _NoConversionError(f"{node.op_type} {node.name!r} to opset {target}: {reason}") from error
    made = converted.graph.node
    if any((s := schema_of(n.op_type, target)) is None or s.deprecated for n in made):
        raise _NoConversionError(f"{node.op_type} {node.name!r} has no conversion to opset {target}")
    return _Replacement(node, converted)


def _wrap(node: ir.Node, opset: int) -> onnx.ModelProto:
    """Return a model of one node: its inputs are ``i0``.. (small integer and float constants kept), outputs ``o0``.. ."""
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


def min_opset(model: ir.Model) -> int:
    """Return the least ONNX operator set, from `LEAST_LOWERED` up, that means the same for every node as it stands.

    A version that only accepts more types than the one before counts as the same if the node's types are in both.
    """
    current = onnx_opset(model)
    least = min(current, LEAST_LOWERED)
    for node in _onnx_nodes(model):
        least = max(least, _node_floor(node, current))
    return least


def _onnx_nodes(model: ir.Model) -> list[ir.Node]:
    nodes = list(all_nodes(model))
    for function in model.functions.values():
        nodes.extend(function.all_nodes())
    return [node for node in nodes if node.domain == ""]


def _node_floor(node: ir.Node, current: int) -> int:
    floor = current
    schema = schema_of(node.op_type, current)
    while schema is not None and floor > LEAST_LOWERED:
        if schema.since_version <= LEAST_LOWERED:
            return LEAST_LOWERED
        floor = schema.since_version
        older = schema_of(node.op_type, floor - 1)
        if older is None or not _means_the_same(node, older, schema):
            return floor
        schema = older
    return floor


def _means_the_same(node: ir.Node, older: defs.OpSchema, newer: defs.OpSchema) -> bool:
    """Return whether a node written for ``newer`` is valid under ``older`` and means the same."""
    if older.deprecated or (node.op_type, newer.since_version) in _MEANING_CHANGED:
        return False
    if (node.op_type, newer.since_version) == ("AveragePool", 19) and attr_int(node, "ceil_mode", 0):
        return False  # opset 19 changed which cells a window that hangs over the edge counts
    if node.op_type == "BatchNormalization" and len(node.outputs) > 1:
        return False
    return _attributes_fit(node, older, newer) and _values_fit(node, older, newer)


def _attributes_fit(node: ir.Node, older: defs.OpSchema, newer: defs.OpSchema) -> bool:
    for name, attribute in node.attributes.items():
        if name in older.attributes:
            continue
        known = newer.attributes.get(name)
        default = known.default_value if known is not None else onnx.AttributeProto()
        if attribute.is_ref() or not default.type or attribute.value != onnx.helper.get_attribute_value(default):
            return False
    for name, known in older.attributes.items():
        if name in node.attributes:
            continue
        after = newer.attributes.get(name)
        if after is None or after.default_value != known.default_value:
            return False
    return True


def _values_fit(node: ir.Node, older: defs.OpSchema, newer: defs.OpSchema) -> bool:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if not older.min_input <= given <= older.max_input or len(node.outputs) > older.max_output:
        return False
    pairs = ((node.inputs[:given], older.inputs, newer.inputs), (node.outputs, older.outputs, newer.outputs))
    for values, before, after in pairs:
        for index, value in enumerate(values):
            if value is None:
                continue
            allowed = before[min(index, len(before) - 1)].types
            if value.type is None:
                if not after[min(index, len(after) - 1)].types <= allowed:
                    return False
            elif _type_text(value.type) not in allowed:
                return False
    return True


def _type_text(kind: ir.TypeProtocol) -> str:
    if isinstance(kind, ir.SequenceType):
        return f"seq({_type_text(kind.elem_type)})"
    if isinstance(kind, ir.OptionalType):
        return f"optional({_type_text(kind.elem_type)})"
    return f"tensor({kind.dtype.name.lower()})"


def set_opset(model: ir.Model, version: int) -> None:
    """Set the ONNX operator set in place: raise by conversion, lower where every node means the same.

    Local functions follow. The file format version is the least that the operator set needs.

    Raises:
        ModelError: a node prevents it; the text names it.
    """
    current = onnx_opset(model)
    if version > current:
        convert_opset(model, version)
        if onnx_opset(model) != version:
            raise ModelError(f"cannot raise the model to opset {version}: {model.metadata_props[NOTE]}")
    else:
        for node in _onnx_nodes(model):
            floor = _node_floor(node, current)
            if version < floor:
                raise ModelError(
                    f"cannot lower the model to opset {version}: {node.op_type} {node.name!r} needs at least {floor}"
                )
        model.opset_imports[""] = version
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = version
    model.ir_version = max(10, least_ir_version(model)) if model.ir_version >= 10 else least_ir_version(model)


def least_ir_version(model: ir.Model) -> int:
    """Return the least file format version that the model's operator sets, functions and metadata allow."""
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items() if d in ("", "ai.onnx.ml")]
    least = int(onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True))
    return max(least, 8 if model.functions else 4)

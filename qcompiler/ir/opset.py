"""The least operator set that can express a model, and setting one: up by conversion, down where nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx import defs

from qcompiler.errors import ModelError
from qcompiler.ir.convert import convert_opset
from qcompiler.ir.graph import all_graphs, all_nodes, attr_int
from qcompiler.ir.older_forms import older_form
from qcompiler.ir.schemas import LEAST_LOWERED, MEANING_CHANGED, NOTE, onnx_opset, schema_of
from qcompiler.ir.shapes import infer_shapes


def min_opset(model: ir.Model) -> int:
    """Return the least ONNX operator set, from `LEAST_LOWERED` up, that means the same for every node as it stands.

    A version that only accepts more types than the one before counts as the same if the node's types are in both.
    """
    _know_types(model)
    current = onnx_opset(model)
    least = min(current, LEAST_LOWERED)
    for node in _onnx_nodes(model):
        least = max(least, _node_floor(node, current))
    return least


def _know_types(model: ir.Model) -> None:
    """Infer types where some are unknown: a value of unknown type holds its operators where they are."""
    if any(value.type is None for node in all_nodes(model) for value in node.outputs):
        infer_shapes(model)


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
    if older.deprecated or (node.op_type, newer.since_version) in MEANING_CHANGED:
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
        default = onnx.AttributeProto() if after is None else after.default_value
        if known.required or known.default_value != default:
            return False
    return True


def _values_fit(node: ir.Node, older: defs.OpSchema, newer: defs.OpSchema) -> bool:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if not older.min_input <= given <= older.max_input or len(node.outputs) > older.max_output:
        return False
    return _types_fit(node.inputs[:given], node.outputs, older, newer)


def _types_fit(
    inputs: Sequence[ir.Value | None], outputs: Sequence[ir.Value], older: defs.OpSchema, newer: defs.OpSchema
) -> bool:
    """Return whether ``older`` takes the types of a node's inputs and results; unknown ones must all be the same."""
    pairs = ((inputs, older.inputs, newer.inputs), (outputs, older.outputs, newer.outputs))
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
    elif version < current:
        _know_types(model)
        rewrites = []
        for node in _onnx_nodes(model):
            floor = _node_floor(node, current)
            rewrite = None
            if version < floor and (rewrite := older_form(node, version)) is not None:
                least = _least_with_types(node, version, current)
                rewrite, floor = (rewrite, floor) if least == version else (None, least)
            rewrites += [rewrite] if rewrite else []
            if version < floor and rewrite is None:
                raise ModelError(
                    f"cannot lower the model to opset {version}: {node.op_type} {node.name!r} needs at least {floor}"
                )
        for rewrite in rewrites:
            rewrite()
        for node in _onnx_nodes(model):
            _drop_newer_defaults(node, version)
        model.opset_imports[""] = version
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = version
    model.ir_version = least_ir_version(model)


def _least_with_types(node: ir.Node, version: int, current: int) -> int:
    """Return the least operator set, from ``version`` on, that takes the types of a node in its older form."""
    newer = schema_of(node.op_type, current)
    for candidate in range(version, current):
        older = schema_of(node.op_type, candidate)
        if newer is None or older is None:
            continue
        # What an older form writes as attributes stands behind the operands that stay.
        if _types_fit(node.inputs[: older.max_input], node.outputs, older, newer):
            return candidate
    return current


def _drop_newer_defaults(node: ir.Node, version: int) -> None:
    """Leave out attributes that the older definition lacks; they hold the default, or the node would not be lowered."""
    schema = schema_of(node.op_type, version)
    for name in list(node.attributes):
        if schema is not None and name not in schema.attributes:
            del node.attributes[name]


_TYPE_IR_VERSION = {"FLOAT8": 9, "INT4": 10, "UINT4": 10, "FLOAT4": 11, "FLOAT8E8M0": 12, "INT2": 13, "UINT2": 13}
"""File format version by element type, from the notes in ``onnx.in.proto``."""


def least_ir_version(model: ir.Model) -> int:
    """Return the least file format version that the model's operator sets, functions and element types allow."""
    imports = [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items() if d in ("", "ai.onnx.ml")]
    least = int(onnx.helper.find_min_ir_version_for(imports, ignore_unknown=True))
    kinds = {v.dtype.name for graph in all_graphs(model) for v in _values(graph) if v.dtype is not None}
    types = [version for start, version in _TYPE_IR_VERSION.items() if any(kind.startswith(start) for kind in kinds)]
    return max(least, 8 if model.functions else 4, *types)


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]

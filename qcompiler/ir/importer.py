"""Import: any ONNX model becomes one that the passes can rely on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import defs
from onnx_ir.passes import PassError as IrPassError
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from qcompiler.errors import ModelError
from qcompiler.ir.graph import ORIGIN, all_graphs, all_nodes, attr_int, is_op, rank_of
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.opset import (
    INTERNAL_OPSET,
    convert_opset,
    least_ir_version,
    onnx_opset,
    schema_of,
    set_opset,
)
from qcompiler.ir.reader import own_tensor, read_model
from qcompiler.ir.shapes import fix_shapes, infer_shapes

OWN_DOMAIN = "qcompiler"
"""Domain of fused operators; its functions are kept, all others are inlined."""

_KNOWN_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft", OWN_DOMAIN})


def import_model(
    source: str | Path | bytes | onnx.ModelProto | ir.Model, *, shapes: Mapping[str, Sequence[int]] | None = None
) -> ir.Model:
    """Read a model and bring it into the form that the passes work on.

    Initializers are no inputs, foreign functions are inlined, the operator set is `INTERNAL_OPSET` or newer (or the
    model's own where a node has no conversion, noted in its metadata), tensor constants are initializers, types and shapes
    are inferred, names are unique over the whole model, and every node carries its own name as origin.

    Args:
        source: path, serialized model, protobuf or IR model; it is not modified. Weights in external files are mapped into
            memory, not read.
        shapes: input name to lengths, for inputs with open axes; -1 leaves an axis open.

    Raises:
        ModelError: the model cannot be read, or has operators that nothing here knows.
    """
    model = read_model(source)
    check_supported(model)
    prepare(model)
    if shapes:
        fix_shapes(model, shapes)
    if onnx_opset(model) < INTERNAL_OPSET:
        infer_shapes(model, trust=False)
        convert_opset(model)
        lift_constants(model)
    undo_softmax_expansion(model)
    finish(model)
    return model


def prepare(model: ir.Model) -> None:
    """Do in place what needs no shapes: inputs, order, functions, constants, names."""
    RemoveInitializersFromInputsPass()(model)
    # Below IR version 4 ONNX's tools take an initializer that is no input for undefined.
    model.ir_version = max(model.ir_version or 0, 10)
    if not model.graph.name:
        model.graph.name = "main"
    make_names_unique(model)
    _sort(model)
    _inline_functions(model)
    lift_constants(model)
    make_names_unique(model)


def finish(model: ir.Model) -> None:
    """Do in place what comes last: names of new nodes, shapes, file format version, origins."""
    make_names_unique(model)
    infer_shapes(model, trust=False)
    model.ir_version = max(model.ir_version, least_ir_version(model))
    for node in all_nodes(model):
        if ORIGIN not in node.metadata_props:
            # Origins are joined by ";", so a name must not hold one.
            node.metadata_props[ORIGIN] = (node.name or "").replace(";", ",")


def check_supported(model: ir.Model) -> None:
    """Refuse what no pass could handle: unknown operators and domains, and inputs that nothing produces.

    Raises:
        ModelError: names the node and what is unknown.
    """
    opset = onnx_opset(model)
    newest = defs.onnx_opset_version()
    if opset > newest:
        raise ModelError(f"the model uses ONNX opset {opset}, the installed onnx knows {newest}: install a newer onnx")
    local = {identifier[0] for identifier in model.functions}
    for node in _every_node(model):
        if node.op_identifier() in model.functions:
            continue
        if node.domain not in _KNOWN_DOMAINS and node.domain not in local:
            raise ModelError(
                f"node {node.name!r}: unknown operator domain {node.domain!r} of {node.op_type}; supported are ONNX, "
                "ai.onnx.ml, com.microsoft and functions inside the model"
            )
        if node.domain == "" and schema_of(node.op_type, opset) is None:
            raise ModelError(f"node {node.name!r}: ONNX opset {opset} has no operator {node.op_type}")
        if node.domain not in _KNOWN_DOMAINS or (node.domain == OWN_DOMAIN and node.domain not in local):
            raise ModelError(f"node {node.name!r}: the model has no function {node.domain}::{node.op_type}")
    for node in all_nodes(model):
        for value in node.inputs:
            if value is not None and value.producer() is None and value.graph is None:
                raise ModelError(f"node {node.name!r} ({node.op_type}) reads {value.name!r}, which nothing produces")


def _every_node(model: ir.Model) -> list[ir.Node]:
    nodes = list(all_nodes(model))
    for function in model.functions.values():
        nodes.extend(function.all_nodes())
    return nodes


def _is_sorted(graph: ir.Graph, seen: set[ir.Node]) -> bool:
    for node in graph:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in seen:
                return False
        for attribute in node.attributes.values():
            single = attribute.type == ir.AttributeType.GRAPH
            if single and not _is_sorted(attribute.as_graph(), seen):
                return False
            if attribute.type == ir.AttributeType.GRAPHS and not all(_is_sorted(g, seen) for g in attribute.as_graphs()):
                return False
        seen.add(node)
    return True


def _sort(model: ir.Model) -> None:
    if _is_sorted(model.graph, set()):
        return
    try:
        model.graph.sort()
    except ValueError as error:
        raise ModelError("the graph has a cycle: a node reads its own result") from error


def _inline_functions(model: ir.Model) -> None:
    foreign = [f for f in model.functions.values() if f.domain != OWN_DOMAIN]
    if not foreign:
        return
    _align_opsets(model, foreign)
    try:
        InlinePass(lambda function: function.domain != OWN_DOMAIN)(model)
    except (IrPassError, PreconditionError, ValueError, KeyError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise ModelError(f"cannot inline the model's local functions: {reason}") from error
    for function in foreign:
        model.functions.pop(function.identifier(), None)
        if function.domain not in {node.domain for node in all_nodes(model)}:
            model.opset_imports.pop(function.domain, None)


def _align_opsets(model: ir.Model, functions: Sequence[ir.Function]) -> None:
    """Bring the model and its functions to one operator set per domain, the newest that any of them asks for."""
    wanted: dict[str, int] = dict(model.opset_imports)
    for function in functions:
        for domain, version in function.opset_imports.items():
            wanted[domain] = max(wanted.get(domain, 0), version)
    if onnx_opset(model) not in (0, wanted.get("", 0)):
        infer_shapes(model)
        set_opset_of_graph(model, wanted[""])
    for function in functions:
        if function.opset_imports.get("", wanted.get("")) != wanted.get(""):
            body = ir.Model(function.graph, ir_version=model.ir_version)
            set_opset_of_graph(body, wanted[""])
        for domain in function.opset_imports:
            function.opset_imports[domain] = wanted[domain]
    model.opset_imports.update(wanted)


def set_opset_of_graph(model: ir.Model, version: int) -> None:
    """Raise the operator set of a graph, its functions left alone.

    Raises:
        ModelError: a node prevents it.
    """
    convert_opset(model, version)
    if onnx_opset(model) != version:
        set_opset(model, version)


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers of the graph that holds them, in place.

    Sparse constants, and constants that are a graph's output, stay nodes.
    """
    for graph in all_graphs(model):
        for node in list(graph):
            if not is_op(node, "Constant") or node.outputs[0].is_graph_output():
                continue
            tensor = constant_tensor(node)
            if tensor is not None:
                _lift(graph, node, tensor)


def _lift(graph: ir.Graph, node: ir.Node, tensor: ir.TensorProtocol) -> None:
    output = node.outputs[0]
    name = output.name or f"{node.name}:out0"
    count = 1
    while name in graph.initializers:
        count += 1
        name = f"{output.name}_{count}"
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=own_tensor(tensor, name)
    )
    output.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    graph.register_initializer(value)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """Return the tensor a Constant node stands for, or None (a sparse one, or a function's attribute)."""
    if len(node.attributes) != 1:
        return None
    attribute = next(iter(node.attributes.values()))
    if attribute.is_ref():
        return None
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in ("value_int", "value_ints"):
        return ir.Tensor(np.asarray(attribute.value, np.int64))
    if attribute.name in ("value_float", "value_floats"):
        return ir.Tensor(np.asarray(attribute.value, np.float32))
    if attribute.name in ("value_string", "value_strings"):
        texts = [attribute.value] if attribute.name == "value_string" else list(attribute.value)
        array = np.array([t.encode() for t in texts], object)
        return ir.StringTensor(array.reshape(()) if attribute.name == "value_string" else array)
    return None


def undo_softmax_expansion(model: ir.Model) -> None:
    """Turn Reshape(Softmax(Flatten(x, axis=rank-1), axis=-1), Shape(x)) back into Softmax(x, axis=-1), in place.

    ONNX's converter expands every Softmax, LogSoftmax and Hardmax of opset 12 and below so, also where the old meaning
    (flatten to two axes) is the new one: flattening in front of the last axis.
    """
    for graph in all_graphs(model):
        for node in list(graph):
            if is_op(node, "Reshape") and node.graph is graph:
                _undo_expansion(graph, node)


def _undo_expansion(graph: ir.Graph, reshape: ir.Node) -> None:
    middle, target = reshape.inputs[0], reshape.inputs[1]
    soft = middle.producer() if middle is not None else None
    shape = target.producer() if target is not None else None
    if soft is None or shape is None or not is_op(soft, "Softmax", "LogSoftmax", "Hardmax") or not is_op(shape, "Shape"):
        return
    flat = soft.inputs[0].producer() if soft.inputs[0] is not None else None
    if flat is None or not is_op(flat, "Flatten") or flat.inputs[0] is not shape.inputs[0] or shape.attributes:
        return
    rank = rank_of(flat.inputs[0])
    axis = attr_int(flat, "axis", 1)
    # A softmax over a flattened scalar axis set is the plain one only if nothing but the last axis is flattened.
    if rank is None or rank == 0 or axis not in (rank - 1, -1) or attr_int(soft, "axis", -1) not in (1, -1):
        return
    only_here = all(
        len(v.uses()) == 1 and not v.is_graph_output() for v in (flat.outputs[0], soft.outputs[0])
    )
    if not only_here or attr_int(reshape, "allowzero", 0) or len({n.graph for n in (flat, soft, shape, reshape)}) > 1:
        return
    soft.replace_input_with(0, flat.inputs[0])
    soft.attributes["axis"] = ir.AttrInt64("axis", -1)
    old, new = reshape.outputs[0], soft.outputs[0]
    new.type, new.shape, name = old.type or new.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(reshape)
    new.name = name
    graph.remove(flat)
    if not shape.outputs[0].uses() and not shape.outputs[0].is_graph_output():
        graph.remove(shape)

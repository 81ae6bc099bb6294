"""Import: any ONNX model becomes one that the passes can rely on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx import defs
from onnx_ir.passes import PassError as IrPassError
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass, RemoveInitializersFromInputsPass

from qcompiler.errors import ModelError, first_line
from qcompiler.ir.analysis import bodies
from qcompiler.ir.constants import lift_constants
from qcompiler.ir.convert import convert_opset
from qcompiler.ir.graph import ORIGIN, all_graphs, all_nodes, is_op, shape_of
from qcompiler.ir.naming import make_names_unique
from qcompiler.ir.opset import least_ir_version
from qcompiler.ir.reader import ModelSource, read_model
from qcompiler.ir.schemas import INTERNAL_OPSET, NOTE, onnx_opset, schema_of
from qcompiler.ir.shapes import fix_shapes, infer_shapes
from qcompiler.ir.softmax import undo_softmax_expansion

OWN_DOMAIN = "qcompiler"
"""Domain of fused operators; its functions are kept, all others are inlined."""

_KNOWN_DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft", OWN_DOMAIN})


def import_model(source: ModelSource, *, shapes: Mapping[str, Sequence[int]] | None = None) -> ir.Model:
    """Read a model and bring it into the form that the passes work on.

    Initializers are no inputs, foreign functions are inlined, the operator set is `INTERNAL_OPSET` or newer (or the
    model's own where a node has no conversion, noted in its metadata), tensor constants are initializers, types and
    shapes are inferred, names are unique over the whole model, and every node carries its own name as origin.

    Args:
        source: path, serialized model, protobuf, IR model or another library's graph (see `read_model`); it is not
            modified. Weights in external files are mapped into memory, not read.
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
    _forget_loop_axes(model)


def finish(model: ir.Model) -> None:
    """Do in place what comes last: names of new nodes, shapes, file format version, origins."""
    make_names_unique(model)
    infer_shapes(model, trust=False)
    model.ir_version = max(model.ir_version, least_ir_version(model))
    for node in all_nodes(model):
        if ORIGIN not in node.metadata_props:
            # Origins are joined by ";", so a name must not hold one.
            node.metadata_props[ORIGIN] = (node.name or "").replace(";", ",")


def _forget_loop_axes(model: ir.Model) -> None:
    """Take the names off the axes of all values inside Loop bodies, in place.

    What a Loop hands from one iteration to the next may grow: a name that also stands outside the body, or before and
    behind a Concat inside it, need not be one length. Scan keeps the shapes of its state (ONNX specification, Scan).
    """
    loops = [node for graph in all_graphs(model) for node in graph if is_op(node, "Loop")]
    for graph in (body for node in loops for body in _nested(node)):
        for value in (*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)):
            shape = shape_of(value)
            if shape is not None and any(isinstance(d, str) for d in shape):
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in shape])


def _nested(node: ir.Node) -> Iterator[ir.Graph]:
    for body in bodies(node):
        yield body
        for inner in body:
            yield from _nested(inner)


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
        if not all(_is_sorted(body, seen) for body in bodies(node)):
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
        raise ModelError(f"cannot inline the model's local functions: {first_line(error)}") from error
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
        _raise_opset(model, wanted[""], lift=True)
    for function in functions:
        if function.opset_imports.get("", wanted.get("")) != wanted.get(""):
            body = ir.Model(function.graph, ir_version=model.ir_version)
            _raise_opset(body, wanted[""], lift=False)
        for domain in function.opset_imports:
            function.opset_imports[domain] = wanted[domain]
    model.opset_imports.update(wanted)


def _raise_opset(model: ir.Model, version: int, *, lift: bool) -> None:
    convert_opset(model, version, lift=lift)
    if onnx_opset(model) != version:
        raise ModelError(f"cannot bring the model and its functions to opset {version}: {model.metadata_props[NOTE]}")

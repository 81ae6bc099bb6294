"""The verifier: what must hold of a graph in each phase. Upper layers add rules by passing them in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx import defs

from qcompiler.engine import Array
from qcompiler.errors import VerifyError
from qcompiler.ir.analysis import bodies
from qcompiler.ir.graph import all_graphs, all_nodes, attr_float, attr_int, const_array, is_op, origins, shape_of
from qcompiler.ir.importer import OWN_DOMAIN
from qcompiler.ir.phase import Phase
from qcompiler.ir.schemas import schema_of

Finding = tuple[ir.Node | None, str]
"""The node that breaks a rule (None for the whole model), and how."""

ALL_PHASES = frozenset(Phase)
BIAS_SCALE_TOLERANCE = 1e-6
"""Relative; a float32 product is off by at most 6e-8."""


@dataclass(frozen=True)
class VerifyRule:
    """One thing that must hold.

    Attributes:
        name: kebab-case, shown in the error.
        phases: the phases it holds in.
        check: yields a finding for each violation.
    """

    name: str
    phases: frozenset[Phase]
    check: Callable[[ir.Model], Iterable[Finding]]


def verify(model: ir.Model, phase: Phase, rules: Iterable[VerifyRule] | None = None) -> None:
    """Check the rules of a phase (`CORE_RULES` by default) in their order.

    Raises:
        VerifyError: names the first broken rule, the node and its origin.
    """
    for rule in CORE_RULES if rules is None else rules:
        if phase not in rule.phases:
            continue
        for node, reason in rule.check(model):
            raise VerifyError(f"{phase.name.lower()} graph breaks {rule.name}: {_where(node)}{reason}")


def _where(node: ir.Node | None) -> str:
    if node is None:
        return ""
    origin = ", ".join(origins(node)) or "none"
    return f"{node.op_type} {node.name!r} (origin {origin}): "


def _roots(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from all_nodes(model)
    for function in model.functions.values():
        yield from function.all_nodes()


def _value_names(model: ir.Model) -> Iterator[Finding]:
    holder: dict[str, ir.Value] = {}
    for graph in all_graphs(model):
        values = [(None, v) for v in (*graph.inputs, *graph.initializers.values())]
        for node, value in (*values, *((n, v) for n in graph for v in n.outputs)):
            if not value.name:
                if value.uses() or value.is_graph_output() or node is None:
                    yield node, "a value that is read has no name"
            elif holder.setdefault(value.name, value) is not value:
                yield node, f"two values are named {value.name!r}"


def _node_names(model: ir.Model) -> Iterator[Finding]:
    seen: set[str] = set()
    for node in all_nodes(model):
        if not node.name:
            yield node, "the node has no name"
        elif node.name in seen:
            yield node, "two nodes have this name"
        seen.add(node.name or "")


def _defined(model: ir.Model) -> Iterator[Finding]:
    for graph in _roots(model):
        yield from _defined_in(graph, set())


def _defined_in(graph: ir.Graph, outer: set[ir.Value]) -> Iterator[Finding]:
    known = outer | set(graph.inputs) | set(graph.initializers.values())
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                yield node, f"reads {value.name!r} before it is defined"
        for body in bodies(node):
            yield from _defined_in(body, known)
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            yield None, f"output {value.name!r} of graph {graph.name!r} is not defined in it"


def _shadowing(model: ir.Model) -> Iterator[Finding]:
    for graph in all_graphs(model):
        names = {v.name for v in graph.inputs}
        for name, value in graph.initializers.items():
            if name in names:
                yield None, f"initializer {name!r} is also an input of graph {graph.name!r}"
            if value.const_value is None:
                yield None, f"initializer {name!r} has no contents"


def _opset_imports(model: ir.Model) -> Iterator[Finding]:
    scopes = [(model.opset_imports, list(all_nodes(model)))]
    scopes += [(f.opset_imports, list(f.all_nodes())) for f in model.functions.values()]
    for imports, nodes in scopes:
        for node in nodes:
            if node.domain not in imports:
                yield node, f"no opset import for domain {node.domain!r}"
    for function in model.functions.values():
        if "" in function.opset_imports and function.opset_imports[""] != model.opset_imports.get(""):
            yield None, f"function {function.name!r} and the model import different ONNX opsets"


def _schemas(model: ir.Model) -> Iterator[Finding]:
    opset = model.opset_imports.get("", 0)
    for node in _all_nodes(model):
        if node.domain != "":
            continue
        schema = schema_of(node.op_type, opset)
        if schema is None or schema.deprecated:
            yield node, f"ONNX opset {opset} has no operator {node.op_type}"
        else:
            yield from _against_schema(node, schema)


def _against_schema(node: ir.Node, schema: defs.OpSchema) -> Iterator[Finding]:
    given = len(node.inputs)
    while given and node.inputs[given - 1] is None:
        given -= 1
    if not schema.min_input <= given <= schema.max_input:
        yield node, f"expected {schema.min_input} to {schema.max_input} inputs, found {given}"
    for index, parameter in enumerate(schema.inputs):
        required = parameter.option == defs.OpSchema.FormalParameterOption.Single
        if required and index < given and node.inputs[index] is None:
            yield node, f"input {parameter.name!r} is required"
    if not schema.min_output <= len(node.outputs) <= schema.max_output:
        yield node, f"expected {schema.min_output} to {schema.max_output} outputs, found {len(node.outputs)}"
    for name in node.attributes:
        if name not in schema.attributes:
            yield node, f"unknown attribute {name!r}"
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            yield node, f"attribute {name!r} is required"


def _quantization(model: ir.Model) -> Iterator[Finding]:
    for node in _all_nodes(model):
        if not (node.domain in ("", "com.microsoft") and node.op_type in ("QuantizeLinear", "DequantizeLinear")):
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        stored = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        types = {v.dtype for v in (zero, stored) if v is not None and v.dtype is not None}
        if len(types) > 1 and zero is not None and stored is not None:
            yield node, f"zero point is {zero.dtype}, the quantized tensor {stored.dtype}"
        yield from _scale_shape(node, node.inputs[0], node.inputs[1], zero)
        scale = const_array(node.inputs[1])
        if scale is not None:
            numbers = np.asarray(scale, np.float64)
            if not (np.isfinite(numbers).all() and (numbers > 0).all()):
                yield node, "a scale is not a positive finite number"


def _scale_shape(
    node: ir.Node, data: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None
) -> Iterator[Finding]:
    shape, of_scale, of_zero = shape_of(data), shape_of(scale), shape_of(zero)
    if of_scale is None:
        return
    if of_zero is not None and not _shapes_agree(of_scale, of_zero):
        yield node, f"scale has shape {of_scale}, zero point {of_zero}"
    if shape is None or of_scale in ((), (1,)):
        return
    block = attr_int(node, "block_size", 0)
    if block:
        if len(of_scale) != len(shape):
            yield node, f"blocked scale has rank {len(of_scale)}, the data {len(shape)}"
        return
    axis = attr_int(node, "axis", 1)
    if len(of_scale) != 1 or not -len(shape) <= axis < len(shape):
        yield node, f"scale of shape {of_scale} does not fit axis {axis} of {shape}"
    elif not _shapes_agree((shape[axis],), of_scale):
        yield node, f"scale has {of_scale[0]} entries, axis {axis} has {shape[axis]}"


def _shapes_agree(first: tuple[int | str | None, ...], second: tuple[int | str | None, ...]) -> bool:
    """Return whether two shapes can be the same; a scalar and one element count as the same."""
    if first in ((), (1,)) and second in ((), (1,)):
        return True
    return len(first) == len(second) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in zip(first, second, strict=True)
    )


def _bias_scales(model: ir.Model) -> Iterator[Finding]:
    """Yield weighted nodes whose int32 bias is not scaled by x_scale * w_scale.

    Engines add the stored integers to the accumulator whatever the scale says (ONNX Runtime 1.31 does so for Gemm).
    The body of a fused function has no numbers of its own: it is looked at once for each call.
    """
    for node in all_nodes(model):
        function = model.functions.get(node.op_identifier())
        if function is None:
            yield from ((node, reason) for reason in _bias_scale(node, {}))
        else:
            passed = dict(zip(function.inputs, node.inputs, strict=False))
            yield from ((node, reason) for inner in function.all_nodes() for reason in _bias_scale(inner, passed))


def _bias_scale(node: ir.Node, passed: Mapping[ir.Value, ir.Value | None]) -> Iterator[str]:
    """Yield what is wrong with the bias of one node; ``passed`` has the arguments of the function it stands in."""
    if not is_op(node, "Conv", "ConvTranspose", "Gemm") or len(node.inputs) < 3:
        return
    scales = [_dequantize_scale(value, passed) for value in node.inputs[:3]]
    bias = node.inputs[2].producer() if node.inputs[2] is not None else None
    stored = bias.inputs[0] if bias is not None else None
    stored = passed.get(stored, stored) if stored is not None else None
    if stored is None or stored.dtype != ir.DataType.INT32 or attr_float(node, "alpha", 1.0) != 1.0:
        return
    x_scale, w_scale, bias_scale = scales
    if x_scale is None or w_scale is None or bias_scale is None:
        return
    expected = np.asarray(x_scale, np.float64).reshape(-1) * np.asarray(w_scale, np.float64).reshape(-1)
    found = np.asarray(bias_scale, np.float64).reshape(-1)
    if expected.size != 1 and found.size not in (1, expected.size):
        yield f"bias has {found.size} scales, expected {expected.size}"
    elif not (np.abs(found - expected) <= BIAS_SCALE_TOLERANCE * np.abs(expected)).all():
        worst = float(np.max(np.abs(found / expected - 1)))
        yield f"bias scale differs from x_scale * w_scale by {worst:.3g} (relative)"


def _dequantize_scale(value: ir.Value | None, passed: Mapping[ir.Value, ir.Value | None]) -> Array | None:
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "DequantizeLinear"):
        return None
    scale = node.inputs[1]
    return const_array(passed.get(scale, scale) if scale is not None else None)


def _no_fused_nodes(model: ir.Model) -> Iterator[Finding]:
    for node in _all_nodes(model):
        if node.domain == OWN_DOMAIN:
            yield node, f"{OWN_DOMAIN} nodes have no place after lowering"
    for identifier in model.functions:
        if identifier[0] == OWN_DOMAIN:
            yield None, f"function {identifier[1]!r} is left after lowering"


def _fused_functions(model: ir.Model) -> Iterator[Finding]:
    for node in _all_nodes(model):
        if node.domain != OWN_DOMAIN:
            continue
        function = model.functions.get(node.op_identifier())
        if function is None:
            yield node, f"the model has no function {OWN_DOMAIN}::{node.op_type}"
        elif len(node.inputs) != len(function.inputs) or len(node.outputs) != len(function.outputs):
            yield (
                node,
                (
                    f"expected {len(function.inputs)} inputs and {len(function.outputs)} outputs, "
                    f"found {len(node.inputs)} and {len(node.outputs)}"
                ),
            )


CORE_RULES: tuple[VerifyRule, ...] = (
    VerifyRule("unique-value-names", ALL_PHASES, _value_names),
    VerifyRule("unique-node-names", ALL_PHASES, _node_names),
    VerifyRule("defined-before-use", ALL_PHASES, _defined),
    VerifyRule("initializers-are-no-inputs", ALL_PHASES, _shadowing),
    VerifyRule("opset-imported", ALL_PHASES, _opset_imports),
    VerifyRule("fits-schema", ALL_PHASES, _schemas),
    VerifyRule("quantization-types", ALL_PHASES, _quantization),
    # An imported model may scale its biases as it likes; the plan derives them before QDQ.
    VerifyRule("bias-scale", frozenset({Phase.QDQ, Phase.FUSED, Phase.LOWERED}), _bias_scales),
    VerifyRule("fused-have-functions", frozenset({Phase.FUSED}), _fused_functions),
    VerifyRule("no-fused-nodes", frozenset({Phase.LOWERED}), _no_fused_nodes),
)
"""What every graph must satisfy, whatever the target."""

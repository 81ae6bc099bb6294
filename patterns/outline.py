"""Turn matched nodes into a call of a model-local function whose body is just these nodes.

The body is the plain Q/DQ form, so a FUSED graph stays valid ONNX. One function serves all matches with the same
operators, attributes and arity. ONNX Runtime needs distinct node names and the model's own opset inside a body, and no
absent optional inputs at the call.
"""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.patterns.builder import Builder
from qcompiler.patterns.language import BuildResult
from qcompiler.patterns.match import Match

DOMAIN = "qcompiler"
ROLES = "qcompiler.roles"
ROOT = "qcompiler.root"


def outline(b: Builder, m: Match) -> BuildResult:
    """Build the call for a match: inputs in the order in which the pattern names them."""
    inside = set(m.nodes)
    roles = {
        name: value for name, value in m.bindings.items() if value.producer() not in inside and "." not in name
    } | {name: value for name, value in m.bindings.items() if "." in name and value.producer() not in inside}
    inputs = list(dict.fromkeys((*roles.values(), *_unnamed(m, inside, roles))))
    root = m.node("root")
    function = _function(b, m, inputs, roles)
    group = root.name or root.op_type
    root.name = b.rewriter.unique(f"{group}:fused")
    # The call takes over the root's name: plan, proof and profile speak of the group by it.
    call = b.node(
        function.name, *inputs, domain=DOMAIN, name=f"{group}:call", outputs=len(m.root.outputs), origin=m.nodes[::-1]
    )
    call.name = group
    for new, old in zip(call.outputs, m.root.outputs, strict=True):
        b.rewriter.take_over(old, new)
    return tuple(call.outputs)


def _unnamed(m: Match, inside: set[ir.Node], roles: dict[str, ir.Value]) -> list[ir.Value]:
    """Return what matched nodes read without a name in the pattern: the bounds of a Clip."""
    named = set(roles.values())
    read = (v for node in m.nodes for v in node.inputs if v is not None and v.producer() not in inside)
    return [v for v in dict.fromkeys(read) if v not in named]


def _function(b: Builder, m: Match, inputs: list[ir.Value], roles: dict[str, ir.Value]) -> ir.Function:
    """Return the function for this match, made on first need."""
    body = sorted(m.nodes, key=list(m.root.graph or ()).index) if len(m.nodes) > 1 else list(m.nodes)
    key = _signature(body, inputs, roles, m)
    model = b.rewriter.model
    kind = m.node("root").op_type
    for function in model.functions.values():
        if function.metadata_props.get("qcompiler.signature") == key:
            return function
    count = sum(1 for f in model.functions.values() if f.metadata_props.get(ROOT) == kind)
    name = f"Q{kind}_{count + 1}"
    function = _make(name, body, inputs, m, model.graph.opset_imports.get("", 21))
    function.metadata_props["qcompiler.signature"] = key
    function.metadata_props[ROLES] = ",".join(f"{role}={inputs.index(value)}" for role, value in roles.items())
    function.metadata_props[ROOT] = kind
    model.functions[function.identifier()] = function
    model.graph.opset_imports.setdefault(DOMAIN, 1)
    return function


def _make(name: str, body: list[ir.Node], inputs: list[ir.Value], m: Match, opset: int) -> ir.Function:
    mapping: dict[ir.Value, ir.Value] = {}
    parameters = []
    for index, value in enumerate(inputs):
        parameter = ir.Value(name=f"in{index}")
        mapping[value] = parameter
        parameters.append(parameter)
    nodes = []
    for index, node in enumerate(body):
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if v is None else mapping[v] for v in node.inputs],
            attributes=[a for a in node.attributes.values() if isinstance(a, ir.Attr)],
            num_outputs=len(node.outputs),
            name=f"{node.op_type}_{index}",
        )
        for position, (new, old) in enumerate(zip(copy.outputs, node.outputs, strict=True)):
            new.name = f"t{index}_{position}" if old.name else ""
            mapping[old] = new
        nodes.append(copy)
    graph = ir.Graph(
        parameters, [mapping[v] for v in m.root.outputs], nodes=nodes, name=name,
        opset_imports={"": opset, **{n.domain: 1 for n in nodes if n.domain}},
    )  # fmt: skip
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])


def _signature(body: list[ir.Node], inputs: list[ir.Value], roles: dict[str, ir.Value], m: Match) -> str:
    """Return a text that is equal for matches that can share a function."""
    number: dict[ir.Value, str] = {value: f"in{i}" for i, value in enumerate(inputs)}
    lines = [",".join(f"{role}={number[value]}" for role, value in roles.items())]
    for index, node in enumerate(body):
        read = ",".join("" if v is None else number[v] for v in node.inputs)
        attributes = ",".join(f"{k}={a.value!r}" for k, a in sorted(node.attributes.items()))
        lines.append(f"{node.op_type}{{{attributes}}}({read})")
        for position, value in enumerate(node.outputs):
            number[value] = f"t{index}_{position}" if value.name else "-"
    lines.append(",".join(number[v] for v in m.root.outputs))
    return ";".join(lines)


def role_indices(function: ir.Function) -> dict[str, int]:
    """Return role to position among the function's inputs."""
    pairs = (pair.split("=") for pair in function.metadata_props[ROLES].split(","))
    return {role: int(index) for role, index in pairs}


def roles_of(function: ir.Function, call: ir.Node) -> dict[str, ir.Value]:
    """Return the call's inputs by role."""
    found = {}
    for role, index in role_indices(function).items():
        value = call.inputs[index]
        assert value is not None
        found[role] = value
    return found

"""Transposes that cancel, directly or through an elementwise region."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_ints, const_array, is_op, rank_of
from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import where
from qcompiler.patterns.language import Rule, op, rule, var
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import BINARY_ELEMENTWISE, UNARY_ELEMENTWISE

MAX_REGION = 64
"""Largest number of elementwise nodes that a cancelled pair of transposes may be apart."""


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """Return the permutation of a Transpose; reversed axes if it is left out, None if the rank is unknown."""
    perm = attr_ints(node, "perm")
    if perm is not None:
        return perm
    count = rank_of(node.inputs[0]) or rank_of(node.outputs[0])
    return None if count is None else tuple(reversed(range(count)))


def compose(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that does ``first``, then ``second``."""
    return tuple(first[axis] for axis in second)


def inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    """Return the permutation that undoes ``perm``."""
    return tuple(perm.index(axis) for axis in range(len(perm)))


def _known(m: Match) -> str | None:
    if permutation(m.node("inner")) is None or permutation(m.root) is None:
        return "unknown-rank: the axes of a Transpose are not known"
    return None


def _pair(b: Builder, m: Match) -> ir.Value:
    first, second = permutation(m.node("inner")), permutation(m.root)
    assert first is not None
    assert second is not None
    both = compose(first, second)
    y = m.root.outputs[0]
    if list(both) != sorted(both):
        return b.op("Transpose", m.x, like=y, perm=both)
    # A graph output needs a node of its own; eliminate-identity removes it where it may.
    return b.op("Identity", m.x, like=y) if y.is_graph_output() else m.x


@dataclass
class _Region:
    """The elementwise nodes between a Transpose and the transposes that it undoes."""

    nodes: list[ir.Node] = field(default_factory=list)
    sources: dict[ir.Value, ir.Value] = field(default_factory=dict)
    constants: list[ir.Value] = field(default_factory=list)
    problem: str | None = None


def _region(m: Match) -> _Region:
    found = _Region()
    perm = permutation(m.root)
    if perm is None:
        found.problem = "unknown-rank: the axes of the Transpose are not known"
        return found
    wanted = inverse(perm)
    members: set[ir.Node] = {m.root}
    _collect(m.x, m.root, wanted, members, found)
    if found.problem is None and not found.sources:
        found.problem = "no-transpose: nothing above is transposed"
    for node in found.nodes:
        value = node.outputs[0]
        if value.is_graph_output() or any(use.node not in members for use in value.uses()):
            found.problem = found.problem or f"interior-used-elsewhere: {value.name} is also read elsewhere"
    return found


def _collect(value: ir.Value, reader: ir.Node, wanted: tuple[int, ...], members: set[ir.Node], found: _Region) -> None:
    """Walk up from ``value``; fill ``found`` with nodes (readers first), sources and constants."""
    if found.problem is not None or value in found.sources or value in found.constants:
        return
    if const_array(value) is not None:
        _collect_constant(value, len(wanted), found)
        return
    node = value.producer()
    if node is None or node.graph is not reader.graph:
        found.problem = f"no-transpose: {value.name} is not transposed"
    elif is_op(node, "Transpose"):
        source = node.inputs[0]
        if permutation(node) != wanted or source is None:
            found.problem = f"permutation: {node.name} permutes other axes"
        else:
            found.sources[value] = source
    elif node in members:
        return
    elif not is_op(node, *UNARY_ELEMENTWISE, *BINARY_ELEMENTWISE) or rank_of(value) != len(wanted):
        found.problem = f"no-transpose: {node.op_type} {node.name} is not elementwise over the same axes"
    elif len(members) > MAX_REGION:
        found.problem = f"too-far: more than {MAX_REGION} nodes lie between"
    else:
        members.add(node)
        found.nodes.append(node)
        data = node.inputs[:1] if is_op(node, *UNARY_ELEMENTWISE) else node.inputs
        for each in data:
            if each is not None:
                _collect(each, node, wanted, members, found)


def _collect_constant(value: ir.Value, count: int, found: _Region) -> None:
    array = const_array(value)
    assert array is not None
    if array.ndim > count:
        found.problem = f"rank: the constant {value.name} has more axes than the region"
    elif array.size > 1 and array.nbytes > 2**20:
        found.problem = f"size-limit: the constant {value.name} is large"
    found.constants.append(value)


def _below_elementwise(m: Match) -> str | None:
    node = m.x.producer()
    return None if is_op(node, *UNARY_ELEMENTWISE, *BINARY_ELEMENTWISE) else "no-region: x is not elementwise"


def _cancels(m: Match) -> str | None:
    return _region(m).problem


def _through(b: Builder, m: Match) -> ir.Value:
    """Rebuild the region on the untransposed sources."""
    region = _region(m)
    perm = permutation(m.root)
    assert perm is not None
    new: dict[ir.Value, ir.Value] = dict(region.sources)
    for value in region.constants:
        new[value] = _permuted(b, value, perm)
    pending = list(region.nodes)
    while pending:
        for node in list(pending):
            count = 1 if is_op(node, *UNARY_ELEMENTWISE) else len(node.inputs)
            data = [v for v in node.inputs[:count] if v is not None]
            if any(v not in new for v in data):
                continue
            inputs = [v if i >= count or v is None else new[v] for i, v in enumerate(node.inputs)]
            made = b.node(node.op_type, *inputs, origin=(node,))
            for key, attribute in node.attributes.items():
                made.attributes[key] = attribute
            old = node.outputs[0]
            made.outputs[0].type = old.type
            if old.shape is not None:
                made.outputs[0].shape = ir.Shape([old.shape[axis] for axis in perm])
            new[old] = made.outputs[0]
            pending.remove(node)
    return new[m.x]


def _permuted(b: Builder, value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
    """Return a constant as seen through a Transpose of its broadcast form."""
    array = const_array(value)
    assert array is not None
    if array.size == 1:
        return value
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return b.constant(np.ascontiguousarray(full.transpose(perm)), f"{value.name}:transposed")


TRANSPOSES: tuple[Rule, ...] = (
    rule(
        "cancel-transpose-pair",
        match=op("Transpose", op("Transpose", var("x"), name="inner")),
        where=[where("axes are known", _known)],
        build=_pair,
        keeps=("inner",),
        doc="Replace two transposes in a row by one, or by none.",
    ),
    rule(
        "cancel-transposes-through",
        match=op("Transpose", var("x")),
        where=[
            where("x is elementwise", _below_elementwise, structural=True),
            where("an elementwise region ends in transposes that this one undoes", _cancels),
        ],
        build=_through,
        doc="Compute elementwise operators between two transposes that cancel on the untransposed values.",
    ),
)
"""Rules of ``cancel-transposes``."""

"""What the cost of a fusion group depends on, as text: equal layers share one measurement, in a model and among models.

A signature names no node and no value. Numbers of weights are not in it, their shapes are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx_ir as ir

from qcompiler.ir.graph import consumers, is_const, shape_of
from qcompiler.search.borders import Border, Kind, form_of, reads, stores
from qcompiler.targets.groups import Group
from qcompiler.targets.target import Target

SCHEME = 1
"""Version of what signatures hold and of what a cost means; another one shares nothing with earlier caches."""
_LAID_OUT = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
"""Operators whose kernels want a layout of their own, so that their cost depends on what is beside them."""
_CARRIES = frozenset({"Add", "Mul", "Concat", "Relu", "Clip", "Sigmoid", "LeakyRelu", "HardSigmoid"})
"""Operators that run in whichever layout their neighbours have."""


def digest(parts: Any) -> str:
    """Return the digest of JSON-like data: 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Signer:
    """Make signatures of one graph's groups.

    Attributes:
        groups: all groups.
        target: its formats.
        elements: elements per value in the measured feed.
        engine_forms: engine-specific rewrites in force.
        shapes: shapes per value in the measured feed, where they are known better than from the graph.
    """

    groups: Sequence[Group]
    target: Target
    elements: Mapping[str, int]
    engine_forms: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def _owner(self) -> dict[ir.Node, Group]:
        return {node: g for g in self.groups for node in g.nodes}

    def signature(self, group: Group, form: str, forms: Mapping[str, str]) -> str:
        """Return the signature of a group in a form, beside neighbours in theirs.

        Args:
            group: one of ``groups``.
            form: its option.
            forms: options of all groups in the build that is (or would be) measured.
        """
        return digest(self.describe(group, form, forms))

    def describe(self, group: Group, form: str, forms: Mapping[str, str]) -> dict[str, Any]:
        """Return what the signature is the digest of, for people."""
        return {
            "scheme": SCHEME,
            "nodes": [self._node(node) for node in group.nodes],
            "form": form,
            "formats": self._formats(group, form),
            "reads": [stores(forms.get(p.name, "float")) for v in group.data if (p := self._producer(v)) is not None],
            "beside": sorted(self._beside(group, forms)),
            "engine": self._engine(group),
        }

    def lone(self, nodes: Sequence[ir.Node]) -> str:
        """Return the signature of all nodes that belong to no group, taken together."""
        return digest({"scheme": SCHEME, "lone": [self._node(n) for n in nodes], "engine": self._engine(None)})

    def conversion(self, kind: Kind, name: str, border: Border) -> str:
        """Return the signature of one conversion of a value between its neighbours."""
        value = self._values.get(name)
        owners = {g.name: g for g in self.groups}
        near = [self._kind(owners.get(border.producer)), *(self._kind(owners.get(r)) for r in border.readers)]
        what = [border.elements, None if value is None else self._value(value), border.outside, near]
        return digest({"scheme": SCHEME, "conversion": kind, "of": what, "format": self.target.activation})

    def plain(self, name: str) -> bool:
        """Return whether no operator beside a value has a layout of its own, as far as its name is a group's."""
        value = self._values.get(name)
        if value is None:
            return True
        near = [self._producer(value), *(self._owner.get(node) for node in consumers(value))]
        return not any(g is not None and g.root.op_type in _LAID_OUT | _CARRIES for g in near)

    def _kind(self, group: Group | None) -> str:
        return "" if group is None else "+".join(n.op_type for n in group.nodes)

    @cached_property
    def _values(self) -> dict[str, ir.Value]:
        return {str(v.name): v for g in self.groups for v in (*g.data, *g.results)}

    def _node(self, node: ir.Node) -> list[Any]:
        inputs = [None if v is None else self._value(v) for v in node.inputs]
        return [node.domain, node.op_type, _attributes(node), inputs, [self._value(v) for v in node.outputs if v.name]]

    def _value(self, value: ir.Value) -> list[Any]:
        """Return dtype and shape; of open axes the number of elements is known, and that is what counts."""
        name = str(value.name)
        shape: Sequence[int | str | None] | None = self.shapes.get(name) or shape_of(value)
        dims = None if shape is None else [d if isinstance(d, int) else "?" for d in shape]
        known = dims is not None and "?" not in dims
        dtype = None if value.dtype is None else value.dtype.name
        return [dtype, dims, None if known else self.elements.get(name, 0), is_const(value)]

    def _formats(self, group: Group, form: str) -> list[Any]:
        if form_of(form) == "float":
            return [self.target.float_type]
        t = self.target
        return [t.activation, t.signed, t.weight, t.weight_bits, t.block, t.bias, group.row.emit.get(form_of(form), "")]

    def _producer(self, value: ir.Value) -> Group | None:
        node = value.producer()
        return None if node is None else self._owner.get(node)

    def _beside(self, group: Group, forms: Mapping[str, str]) -> Iterator[str]:
        """Yield the neighbours that decide the layout, and whether they run on integers."""
        if group.root.op_type not in _LAID_OUT | _CARRIES:
            return
        near = [("before", self._producer(v)) for v in group.data]
        near += [("behind", self._owner.get(node)) for v in group.results for node in consumers(v)]
        for side, other in near:
            if other is None or other.root.op_type not in _LAID_OUT | _CARRIES:
                yield f"{side} plain"
            else:
                integer = reads(forms.get(other.name, "float")) is not None
                yield f"{side} {other.root.op_type} {'integer' if integer else 'float'}"

    def _engine(self, group: Group | None) -> list[list[str]]:
        """Return the engine forms that apply: those of the whole build, and the group's own."""
        found = []
        for key, value in self.engine_forms.items():
            head, colon, name = key.partition(":")
            if not colon:
                found.append([key, value])
            elif group is not None and name == group.name:
                found.append([head, value])
        return sorted(found)


def _attributes(node: ir.Node) -> list[list[Any]]:
    """Return the attributes by name; of tensors and graphs only what time can depend on."""
    found: list[list[Any]] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            found.append([name, "ref"])
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            found.append([name, tensor.dtype.name, list(tensor.shape.numpy())])
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            found.append([name, "graph"])
        else:
            value = attribute.value
            found.append([name, list(value) if isinstance(value, tuple | list) else value])
    return found

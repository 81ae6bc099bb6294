"""Where a float graph and a quantized one of it can be compared: values that both have, and whose error they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.explaining.stored_values import stored_name, stored_numbers
from qcompiler.ir.analysis import holders
from qcompiler.ir.graph import is_float, single_consumer
from qcompiler.quant.plan import Form
from qcompiler.targets.groups import Group


@dataclass(frozen=True)
class Unit:
    """One place where error can be born.

    Attributes:
        name: name of the group, or of the node that computes the value.
        operator: its operator.
        value: the value in the float graph.
        stored: name of the integers in the quantized graph; empty where it is float there.
        form: form of the group; empty in a foreign model.
        readers: groups that read the value as integers.
        others: further groups inside the same body.
        inputs: values that are float in front of the group, and that it reads as the integers ``NAME:q``.
    """

    name: str
    operator: str
    value: str
    stored: str = ""
    form: str = ""
    readers: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


def own_units(
    graph: ir.Model, compiled: ir.Model, groups: Sequence[Group], forms: Mapping[str, Form]
) -> tuple[Unit, ...]:
    """Return the units of a build of ours: what each quantized group hands on.

    Groups in bodies of If, Loop and Scan are one unit per outermost node that holds them.
    """
    numbers = stored_numbers(compiled)
    there = {str(v.name) for n in compiled.graph for v in n.outputs}
    top = set(graph.graph)
    written = {str(v.name) for g in groups if forms.get(g.name) == "static" for v in g.results}
    made: dict[str, Unit] = {}
    for group in groups:
        form = forms.get(group.name, "float")
        if form == "float":
            continue
        if group.root not in top:
            _add_body(made, graph, group, form)
            continue
        inputs = tuple(n for v in group.data if (n := str(v.name)) not in written and f"{n}:q" in numbers)
        values = group.results if form == "static" else (group.float_result,)
        for value in values:
            name = str(value.name)
            stored = f"{name}:q" if form == "static" and f"{name}:q" in numbers else ""
            if not stored and name not in there:
                continue
            readers = tuple(
                g.name for g in groups if stored and value in g.data and forms.get(g.name, "float") != "float"
            )
            made[name] = Unit(group.name, group.root.op_type, name, stored, form, readers, (), inputs)
    return tuple(made.values())


def _add_body(made: dict[str, Unit], graph: ir.Model, group: Group, form: str) -> None:
    held_by = holders(graph)
    holder: ir.Node | None = group.root
    while holder is not None and holder.graph is not graph.graph:
        inside = holder.graph
        holder = held_by.get(inside) if isinstance(inside, ir.Graph) else None
    for value in holder.outputs if holder is not None else ():
        if not is_float(value):
            continue
        name = str(value.name)
        old = made.get(name)
        others = (*old.others, group.name) if old is not None else ()
        first = old.name if old is not None else group.name
        made[name] = Unit(first, f"inside {holder.op_type}", name, "", form, (), others)  # type: ignore[union-attr]


def foreign_units(graph: ir.Model, compiled: ir.Model) -> tuple[Unit, ...]:
    """Return the units of a model without a record: float values that both have, by their name or their node's.

    A Relu or Clip that the tool removed left its meaning to the value in front of it.
    """
    numbers = stored_numbers(compiled)
    there = {str(v.name): v for n in compiled.graph for v in n.outputs if v.name}
    named = {(str(n.name), n.op_type): n for n in compiled.graph}
    units = []
    for node in graph.graph:
        for index, value in enumerate(node.outputs):
            if not is_float(value):
                continue
            name = str(value.name)
            if f"{name}:q" in numbers:
                front = _in_front(node)
                units.append(Unit(str(front.name), front.op_type, name, f"{name}:q"))
                continue
            found = named.get((str(node.name), node.op_type))
            twin = there.get(name) or (found.outputs[index] if found is not None else None)
            if twin is None:
                continue
            stored = stored_name(compiled, twin, numbers)
            if not stored and str(twin.name) != name:
                continue
            reader = single_consumer(value)
            if reader is not None and reader.op_type in ("Relu", "Clip"):
                # What the activation cuts off anyway is no error: the two are looked at together.
                if not stored or str(reader.outputs[0].name) in there:
                    continue
                name = str(reader.outputs[0].name)
            front = _in_front(node)
            units.append(Unit(str(front.name), front.op_type, name, stored))
    return tuple({u.value: u for u in units}.values())


def _in_front(node: ir.Node) -> ir.Node:
    """Return the operator that an activation goes with, which is the one to name; any other node itself."""
    source = node.inputs[0] if node.op_type in ("Relu", "Clip") and node.inputs else None
    producer = None if source is None or single_consumer(source) is not node else source.producer()
    return node if producer is None else producer

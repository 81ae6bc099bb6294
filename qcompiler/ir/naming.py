"""Names that are unique over the whole model, subgraphs included, and the same on every run."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, all_nodes


def make_names_unique(model: ir.Model) -> None:
    """Give every value and every node a name of its own, in place.

    Names that are unique already stay; of several equal ones the first in program order keeps it, but the main graph's
    inputs and outputs always keep theirs. An unnamed node becomes ``OpType_N``, N its position in program order. Values
    and nodes may share a name, as they do in most exported models. Omitted optional outputs stay nameless.
    """
    _name_nodes(model)
    _name_values(model)


def _name_nodes(model: ir.Model) -> None:
    nodes = list(all_nodes(model))
    wanted = {node.name for node in nodes if node.name}
    taken: set[str] = set()
    for index, node in enumerate(nodes):
        name = node.name
        if not name or name in taken:
            name = _free(name or f"{node.op_type}_{index}", wanted | taken if not name else taken, wanted)
        taken.add(name)
        if node.name != name:
            node.name = name


def _free(name: str, taken: set[str], wanted: set[str]) -> str:
    if name not in taken:
        return name
    count = 2
    while f"{name}_{count}" in taken or f"{name}_{count}" in wanted:
        count += 1
    return f"{name}_{count}"


def _values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value that should have a name, the main graph's inputs and outputs first."""
    yield from model.graph.inputs
    yield from model.graph.outputs
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            for value in node.outputs:
                if value.name or value.uses() or value.is_graph_output():
                    yield value


def _name_values(model: ir.Model) -> None:
    values = list(dict.fromkeys(_values(model)))
    wanted = {v.name for v in values if v.name}
    taken: set[str] = set()
    renames: list[tuple[ir.Value, str]] = []
    for value in values:
        name = value.name
        if not name:
            node = value.producer()
            base = f"{node.name}:out{value.index()}" if node is not None else "value"
            name = _free(base, wanted | taken, wanted)
        elif name in taken:
            name = _free(name, taken, wanted)
        taken.add(name)
        if name != value.name:
            renames.append((value, name))
    for value, name in renames:
        value.name = name

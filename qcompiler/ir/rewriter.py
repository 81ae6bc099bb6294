"""The one way passes change a graph: names stay unique, origins are inherited, dead nodes go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import ORIGIN, all_graphs, origins


class Rewriter:
    """Edit a model in place.

    Names of values and nodes are unique over the whole model, subgraphs included, so that a name identifies a value
    in every dump, plan and profile. New nodes inherit the origins of the nodes they stand for.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.changes = 0
        self._names: set[str] = set()
        for graph in all_graphs(model):
            self._names.update(v.name for v in graph.inputs if v.name)
            self._names.update(graph.initializers)
            for node in graph:
                if node.name:
                    self._names.add(node.name)
                self._names.update(v.name for v in node.outputs if v.name)

    def unique(self, wanted: str) -> str:
        """Return ``wanted``, with a number behind it if the name is taken, and take it."""
        name, count = wanted, 1
        while name in self._names:
            count += 1
            name = f"{wanted}_{count}"
        self._names.add(name)
        return name

    def constant(self, array: Array | ir.TensorProtocol, name: str, graph: ir.Graph | None = None) -> ir.Value:
        """Add an initializer to ``graph`` (the main graph by default) and return its value."""
        unique = self.unique(name)
        tensor = array if isinstance(array, ir.TensorProtocol) else ir.Tensor(np.asarray(array), name=unique)
        if tensor.name != unique:
            tensor.name = unique
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        (graph if graph is not None else self.model.graph).register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        before: ir.Node | None = None,
        after: ir.Node | None = None,
        origin: Iterable[ir.Node] | str = (),
        name: str | None = None,
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
        outputs: Sequence[str] | int = 1,
    ) -> ir.Node:
        """Insert a node beside an existing one and return it.

        Args:
            op_type: operator name.
            inputs: values read; None is an absent optional input.
            before: insert in front of this node; exactly one of ``before`` and ``after`` is given.
            after: insert behind this node.
            origin: the nodes it stands for (their origins are joined), or one origin as text.
            name: wanted node name; by default the first origin and the operator.
            domain: operator domain.
            attributes: Python values by attribute name.
            outputs: wanted names of the outputs, or how many.
        """
        if (before is None) == (after is None):
            raise ValueError("a new node needs exactly one neighbour: before or after")
        tags = [origin] if isinstance(origin, str) else list(dict.fromkeys(t for n in origin for t in origins(n)))
        wanted = name or (f"{tags[0]}/{op_type}" if tags else op_type)
        unique = self.unique(wanted)
        count = outputs if isinstance(outputs, int) else len(outputs)
        made = ir.node(op_type, inputs, attributes=attributes, domain=domain, num_outputs=count, name=unique)
        for index, value in enumerate(made.outputs):
            suffix = ":out" if count == 1 else f":out{index}"
            value.name = self.unique(unique + suffix if isinstance(outputs, int) else outputs[index])
        if tags:
            made.metadata_props[ORIGIN] = ";".join(tags)
        neighbour = before if before is not None else after
        assert neighbour is not None
        assert neighbour.graph is not None
        if before is not None:
            neighbour.graph.insert_before(neighbour, made)
        else:
            neighbour.graph.insert_after(neighbour, made)
        self.changes += 1
        return made

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let every reader of ``old`` read ``new``; a graph output keeps its name and type."""
        if old.is_graph_output():
            self._replace_output(old, new)
        old.replace_all_uses_with(new)
        self.changes += 1

    @staticmethod
    def declare(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None) -> None:
        """Give a value an element type (none if unknown) and a shape; its type object is shared with nothing."""
        value.type = None if dtype is None else ir.TensorType(dtype)
        value.shape = shape

    def take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Give a value that stands for another its name, type and shape; `replace` then moves the readers.

        A graph output keeps its name through `replace` itself.
        """
        new.type, new.shape = old.type, old.shape
        if not old.is_graph_output():
            name = old.name
            old.name = self.unique(f"{name}:was")
            new.name = name

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        graph = old.graph
        assert graph is not None
        if new.is_graph_output() or new.is_graph_input() or new.is_initializer() or new.graph is not graph:
            # One value cannot carry two output names, nor be input and output: keep an Identity between.
            anchor = old.producer()
            assert anchor is not None
            copy = self.node("Identity", [new], before=anchor, origin=[anchor]).outputs[0]
            new = copy
        if new.type is None:
            new.type = old.type
        if new.shape is None:
            new.shape = old.shape
        name = old.name
        assert name is not None
        old.name = self.unique(name + ":was")
        new.name = name
        for index, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[index] = new

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let one input of a node read another value."""
        node.replace_input_with(index, value)
        self.changes += 1

    def erase(self, node: ir.Node) -> None:
        """Remove a node whose outputs nothing reads."""
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        self.changes += 1

    def erase_dead(self, roots: Iterable[ir.Node]) -> None:
        """Remove the given nodes and their producers as far as nothing reads them any more."""
        work = list(roots)
        while work:
            node = work.pop()
            if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
                continue
            producers = [p for v in node.inputs if v is not None and (p := v.producer()) is not None]
            captured = [v for v in node.inputs if v is not None and v.is_initializer()]
            self.erase(node)
            work.extend(producers)
            for value in captured:
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    graph = value.graph
                    if graph is not None and value.name is not None and value.name in graph.initializers:
                        del graph.initializers[value.name]

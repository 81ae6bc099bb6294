"""What a rule's build function builds with: new nodes in front of the root, with its origins."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.rewriter import Rewriter
from qcompiler.patterns.match import Match
from qcompiler.patterns.operators import AttributeValue


class Builder:
    """Make nodes and constants for one match."""

    def __init__(self, rewriter: Rewriter, match: Match) -> None:
        self.rewriter = rewriter
        self.match = match
        self.made: list[ir.Node] = []

    @property
    def opset(self) -> int:
        """Return the version of the ONNX domain in this model."""
        return self.match.opset

    def node(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        outputs: int = 1,
        origin: tuple[ir.Node, ...] | None = None,
        like: ir.Value | None = None,
        **attributes: AttributeValue,
    ) -> ir.Node:
        """Insert a node in front of the root; keywords other than those listed are its attributes.

        Args:
            op_type: operator name.
            inputs: values read; None is an absent optional input.
            domain: operator domain.
            name: wanted node name.
            outputs: how many outputs.
            origin: nodes it stands for; all matched nodes by default.
            like: a value whose type and shape the first output has.
            attributes: attributes by name.
        """
        made = self.rewriter.node(
            op_type,
            inputs,
            before=self.match.root,
            origin=self.match.nodes if origin is None else origin,
            name=name,
            domain=domain,
            attributes={key: list(v) if isinstance(v, tuple) else v for key, v in attributes.items()},
            outputs=outputs,
        )
        if like is not None:
            made.outputs[0].type = like.type
            made.outputs[0].shape = like.shape
        self.made.append(made)
        return made

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        origin: tuple[ir.Node, ...] | None = None,
        like: ir.Value | None = None,
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Insert a node of one output in front of the root and return that output; see `node`."""
        made = self.node(op_type, *inputs, domain=domain, name=name, outputs=1, origin=origin, like=like, **attributes)
        return made.outputs[0]

    def behind(
        self, value: ir.Value, op_type: str, *inputs: ir.Value, name: str, shape: ir.Shape | None, **attributes: int
    ) -> ir.Value:
        """Insert a node right behind the one that makes ``value``, for whoever reads that, and return its output.

        Args:
            value: what it is about; behind a graph input the node comes first in the graph.
            op_type: operator name.
            inputs: values read, known behind ``value``.
            name: wanted node name.
            shape: shape of the output, whose type is that of ``value``.
            attributes: attributes by name.
        """
        maker = value.producer()
        if maker is not None:
            made = self.rewriter.node(op_type, inputs, after=maker, origin=[maker], name=name, attributes=attributes)
        else:
            graph = value.graph if value.graph is not None else self.rewriter.model.graph
            made = self.rewriter.node(
                op_type, inputs, before=graph[0], origin=self.match.nodes, name=name, attributes=attributes
            )
        self.rewriter.declare(made.outputs[0], value.dtype, shape)
        self.made.append(made)
        return made.outputs[0]

    def constant(self, array: Array | ir.TensorProtocol, name: str) -> ir.Value:
        """Add a constant to the main graph; ``name`` is made unique."""
        return self.rewriter.constant(array, name)

    def scalar_like(self, number: float, value: ir.Value, name: str) -> ir.Value:
        """Add a scalar constant of the element type of ``value`` (float32 if unknown)."""
        dtype = np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
        return self.constant(np.asarray(number, dtype=dtype), name)

    def clone(
        self,
        node: ir.Node,
        *inputs: ir.Value | None,
        like: ir.Value | None = None,
        drop: tuple[str, ...] = (),
        **attributes: AttributeValue,
    ) -> ir.Value:
        """Insert a node of the same operator and attributes on other inputs and return its first output.

        Args:
            node: the node to copy (operator, domain, attributes, number of outputs).
            inputs: what the copy reads.
            like: a value whose type and shape the first output has; that of ``node`` by default.
            drop: attributes that are left out.
            attributes: attributes that are set anew.
        """
        like = node.outputs[0] if like is None else like
        made = self.node(node.op_type, *inputs, domain=node.domain, outputs=len(node.outputs), like=like)
        for key, attribute in node.attributes.items():
            if key not in drop and key not in attributes:
                made.attributes[key] = attribute
        for key, value in attributes.items():
            self.set_attribute(made, key, value)
        return made.outputs[0]

    def set_attribute(self, node: ir.Node, name: str, value: AttributeValue | None) -> None:
        """Set an attribute of a node in place; None removes it."""
        if value is None:
            node.attributes.pop(name, None)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        self.rewriter.changes += 1

    def set_input(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let one input of a node read another value (the list of inputs grows if it must)."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        self.rewriter.set_input(node, index, value)

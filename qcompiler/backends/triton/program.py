"""A lowered model as a list of steps, for any lengths of its open axes; what the artifact stores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir

from qcompiler.backends.triton.operators import TORCH_OPERATORS
from qcompiler.engine import Array
from qcompiler.errors import ModelError
from qcompiler.ir.graph import origins, shape_of
from qcompiler.ir.schemas import onnx_opset
from qcompiler.passes.kernel_nodes import ARGUMENTS, KERNEL_DOMAIN

TORCH, KERNEL, CONTROL = "torch", "kernel", "control"
CONTROLS = ("If", "Loop", "Scan")
TENSOR = "tensor:"
"""How an attribute begins that names a weight: the contents of a tensor attribute."""
UNRUNNABLE = frozenset({"LSTM", "GRU", "RNN"})
"""Operators without a step, and none to come: recurrent ones."""


@dataclass(frozen=True)
class Port:
    """An input or output: name, dtype (NumPy's name, or ONNX's in lower case), and lengths, names where open."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        name: of the node; of a fused group, the group's.
        kind: ``kernel``, ``torch`` (a function) or ``control`` (If, Loop, Scan, on the host).
        operator: kernel or ONNX operator.
        inputs: names of values, empty where an optional input is absent.
        outputs: names of values, empty where an output is not wanted.
        arguments: a kernel's names for its inputs.
        attributes: ONNX attributes, or a kernel's options and numbers.
        bodies: of a control step, by attribute.
        origins: imported nodes that it stands for.
    """

    name: str
    kind: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    bodies: Mapping[str, Program] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Return all values that it reads, those that its bodies capture too."""
        own = [name for name in self.inputs if name]
        return tuple(dict.fromkeys((*own, *(c for body in self.bodies.values() for c in body.captures))))


@dataclass(frozen=True)
class Program:
    """Steps in order.

    Attributes:
        inputs: fed by the caller.
        outputs: given back.
        steps: what to do.
        weights: constants by name; those of bodies are among their own.
        opset: version of the ONNX operator set.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    weights: Mapping[str, Array]
    opset: int

    @property
    def captures(self) -> tuple[str, ...]:
        """Return the values that the steps read from outside."""
        known = {p.name for p in self.inputs} | set(self.weights) | {n for s in self.steps for n in s.outputs}
        wanted = (*(n for s in self.steps for n in s.reads), *(p.name for p in self.outputs))
        return tuple(dict.fromkeys(n for n in wanted if n not in known))

    def all_steps(self) -> Iterator[Step]:
        """Yield all steps, those of bodies behind the step that holds them."""
        for step in self.steps:
            yield step
            for body in step.bodies.values():
                yield from body.all_steps()


def build_program(model: ir.Model) -> Program:
    """Turn a lowered model into steps; operators that ONNX defines by others (Attention) are written out by them.

    Raises:
        ModelError: an operator has no step; the text names the nodes.
    """
    if model.functions:
        raise ModelError(f"a lowered model has no functions; found {next(iter(model.functions))}")
    opset = onnx_opset(model)
    program = _program(model.graph, opset)
    missing = _missing(program)
    if missing and (written := _written_out(model, missing, opset)) is not None:
        program = _program(written.graph, opset)
        missing = _missing(program)
    if missing:
        listed = "; ".join(f"{op} ({', '.join(names[:5])})" for op, names in sorted(missing.items()))
        why = " (recurrent operators have none)" if set(missing) & UNRUNNABLE else ""
        raise ModelError(f"the Triton executor has no step for {listed}{why}; compile for another target")
    return program


def _missing(program: Program) -> dict[str, list[str]]:
    """Return operators without a step, and the nodes that are such."""
    missing: dict[str, list[str]] = {}
    for step in program.all_steps():
        if step.kind == TORCH and step.operator not in TORCH_OPERATORS:
            missing.setdefault(step.operator, []).append(step.name)
    return missing


def _written_out(model: ir.Model, missing: Mapping[str, Sequence[str]], opset: int) -> ir.Model | None:
    """Return the model with operators written out that ONNX defines by others, None if there are no such."""
    names = []
    for name in missing:
        try:
            schema = onnx.defs.get_schema(name, opset)
        except onnx.defs.SchemaError:
            continue
        if getattr(schema, "has_function", False) or getattr(schema, "has_context_dependent_function", False):
            names.append(("", name))
    if not names:
        return None
    try:
        return ir.from_proto(onnx.inliner.inline_selected_functions(ir.to_proto(model), names, False, True))
    except (RuntimeError, ValueError):  # a type is unknown, or the model does not fit into one protobuf
        return None


def _program(graph: ir.Graph, opset: int) -> Program:
    weights: dict[str, Array] = {}
    for name, value in graph.initializers.items():
        assert value.const_value is not None
        weights[name] = value.const_value.numpy()
    steps = tuple(_step(node, weights, opset) for node in graph)
    inputs = tuple(_port(v) for v in graph.inputs if v.name not in weights)
    return Program(inputs, tuple(_port(v) for v in graph.outputs), steps, weights, opset)


def _port(value: ir.Value) -> Port:
    return Port(str(value.name), dtype_of(value), shape_of(value))


def dtype_of(value: ir.Value) -> str:
    """Return the name of a value's element type, empty if it is unknown."""
    return "" if value.dtype is None else dtype_name(value.dtype)


def dtype_name(dtype: ir.DataType) -> str:
    """Return NumPy's name of an element type, ONNX's in lower case where NumPy has none."""
    names = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return names.get(dtype, dtype.name.lower())


def _step(node: ir.Node, weights: dict[str, Array], opset: int) -> Step:
    attributes: dict[str, Any] = {}
    bodies: dict[str, Program] = {}
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies[name] = _program(attribute.as_graph(), opset)
        elif attribute.type == ir.AttributeType.TENSOR:
            key = f"{node.outputs[0].name}:{name}"
            weights[key] = attribute.as_tensor().numpy()
            attributes[name] = f"{TENSOR}{key}"
        else:
            attributes[name] = _plain(attribute.value)
    kind = KERNEL if node.domain == KERNEL_DOMAIN else CONTROL if node.op_type in CONTROLS else TORCH
    if node.domain not in ("", "ai.onnx", KERNEL_DOMAIN):
        raise ModelError(f"{node.name}: there is no step for {node.domain}::{node.op_type}")
    arguments = tuple(attributes.pop(ARGUMENTS, ())) if kind == KERNEL else ()
    return Step(
        node.name or f"{node.op_type}:{node.outputs[0].name}", kind, node.op_type,
        tuple("" if v is None else str(v.name) for v in node.inputs), tuple(str(v.name or "") for v in node.outputs),
        arguments, attributes, bodies, origins(node),
    )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return int(value) if isinstance(value, ir.DataType) else value

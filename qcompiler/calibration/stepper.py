"""Run a graph piece by piece, so that a value can be looked at as soon as it exists and is freed right after.

The main graph is cut into segments whose looked-at values fit a few megabytes; each segment is a session of its own and
hands its results to the next without a copy. Every operator runs once per feed however small the pieces are, which is
what makes a memory cap cheap. Control flow whose bodies hold looked-at values is stepped through here, so values of a
Loop are seen iteration by iteration and never stacked, and a branch that is not taken is not run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array, Engine, EngineOptions, EngineValue, Feeds, Runner
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import attr_int, attr_ints, is_const, is_op

Sink = Callable[[str, Array], None]
"""Takes the name of a looked-at value and its numbers, which are valid during the call only."""

_STEPPED = ("If", "Loop", "Scan")
_SCAN_WITHOUT_BATCH = 9
"""Operator set before which a Scan has a batch axis and lengths per sequence; those run as a whole."""
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FLOATS = (ir.DataType.FLOAT, *_HALVES)


@dataclass(frozen=True, eq=False)
class Segment:
    """Neighbouring nodes that run as one model.

    Attributes:
        nodes: in program order.
        inputs: values from in front of the segment.
        outputs: values that are looked at or read behind it.
        constants: initializers that the nodes read.
    """

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]


@dataclass(frozen=True, eq=False)
class Control:
    """An If, Loop or Scan whose bodies are stepped through.

    Attributes:
        node: the node.
        bodies: attribute name to its graph, cut up.
        whole: the node as a segment, for a Loop or Scan without iterations.
    """

    node: ir.Node
    bodies: Mapping[str, Block]
    whole: Segment


@dataclass(frozen=True, eq=False)
class Block:
    """One graph, cut up.

    Attributes:
        graph: the main graph or a body.
        steps: in program order.
        dying: values that no later step reads, for each step.
    """

    graph: ir.Graph
    steps: tuple[Segment | Control, ...]
    dying: tuple[tuple[ir.Value, ...], ...]


class _Scope:
    """Values that exist at a moment; those of enclosing graphs can be read as well."""

    def __init__(self, engine: Engine, outer: _Scope | None = None) -> None:
        self._engine, self._outer = engine, outer
        self.values: dict[ir.Value, EngineValue] = {}

    def __getitem__(self, value: ir.Value) -> EngineValue:
        scope: _Scope | None = self
        while scope is not None:
            if value in scope.values:
                return scope.values[value]
            scope = scope._outer
        if value.const_value is None:
            raise CalibrationError(f"value {value.name!r} has not been computed; the graph is not in program order")
        return self._engine.value(value.const_value.numpy())


@dataclass
class Stepper:
    """A model that is run piece by piece.

    Attributes:
        model: canonical FLOAT graph in program order; it is not changed.
        names: values to look at, in any graph; those that are no float tensors are never seen.
        engine: runs the pieces.
        options: how; with the engine's optimizations on, values would depend on where the cuts are.
        limit: bytes of looked-at values that one piece may hold.
    """

    model: ir.Model
    names: Collection[str]
    engine: Engine
    options: EngineOptions
    limit: int
    _sizes: dict[str, int] = field(default_factory=dict)
    _runners: dict[tuple[Segment, tuple[str, ...]], Runner] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _program: Block | None = None

    def run(self, feed: Feeds, sink: Sink) -> None:
        """Run one feed and hand every looked-at value to the sink, once for each time it is computed."""
        with self._lock:
            if self._program is None:
                self._sizes = estimated_sizes(self.model, self._wanted, feed) | self._sizes
                self._program = self._block(self.model.graph, needed=())
            program = self._program
        inputs = [self.engine.value(np.asarray(feed[str(v.name)])) for v in self.model.graph.inputs]
        self._run_block(program, inputs, None, sink)

    @property
    def segments(self) -> int:
        """Return into how many pieces the main graph is cut, 0 before the first run."""
        return 0 if self._program is None else len(self._program.steps)

    @cached_property
    def _wanted(self) -> frozenset[str]:
        return frozenset(self.names)

    # ---- cutting -----------------------------------------------------------------------------------------------

    def _block(self, graph: ir.Graph, needed: Sequence[ir.Value]) -> Block:
        """Cut a graph up; ``needed`` are its outputs where someone reads them."""
        pieces = list(self._pieces(graph))
        reads = [set(_reads(piece)) for piece in pieces]
        last: dict[ir.Value, int] = {v: len(pieces) for v in needed}
        for index, values in enumerate(reads):
            for value in values:
                last[value] = max(last.get(value, 0), index)
        steps: list[Segment | Control] = []
        dying: list[list[ir.Value]] = [[] for _ in pieces]
        for index, piece in enumerate(pieces):
            made = [v for node in piece for v in node.outputs if v.name]
            kept = [v for v in made if self._looked_at(v) or last.get(v, -1) > index]
            steps.append(self._step(piece, kept, index, reads[index]))
            for value in kept:
                place = last.get(value, index)
                if place < len(pieces):
                    dying[max(place, index)].append(value)
        return Block(graph, tuple(steps), tuple(map(tuple, dying)))

    def _step(
        self, nodes: Sequence[ir.Node], kept: Sequence[ir.Value], index: int, reads: set[ir.Value]
    ) -> Segment | Control:
        inside = {v for node in nodes for v in node.outputs}
        outside = sorted((v for v in reads if v not in inside), key=lambda v: str(v.name))
        segment = Segment(
            tuple(nodes),
            tuple(v for v in outside if not is_const(v)),
            tuple(kept),
            tuple(v for v in outside if is_const(v)),
        )
        if len(nodes) > 1 or not self._stepped(nodes[0]):
            return segment
        node = nodes[0]
        graphs = {a.name: a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH}
        bodies = {name: self._block(body, body.outputs) for name, body in graphs.items()}
        return Control(node, bodies, segment)

    def _pieces(self, graph: ir.Graph) -> Iterator[list[ir.Node]]:
        """Yield runs of nodes: control flow to step through alone, others up to the limit."""
        piece: list[ir.Node] = []
        used = 0
        for node in graph:
            size = sum(self._sizes.get(str(v.name), 0) for v in node.outputs if self._looked_at(v))
            if piece and (self._stepped(node) or used + size > self.limit):
                yield piece
                piece, used = [], 0
            piece.append(node)
            used += size
            if self._stepped(node) or _is_half(node):
                yield piece
                piece, used = [], 0
        if piece:
            yield piece

    def _looked_at(self, value: ir.Value) -> bool:
        return value.name in self._wanted

    def _stepped(self, node: ir.Node) -> bool:
        """Return whether the bodies of a control flow node hold a looked-at value, at any depth."""
        if node.op_type not in _STEPPED or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "Scan" and self.model.graph.opset_imports.get("", _SCAN_WITHOUT_BATCH) < _SCAN_WITHOUT_BATCH:
            return False
        return any(
            self._looked_at(v) or self._stepped(inner)
            for body in bodies_of(node)
            for inner in body
            for v in (*body.inputs, *inner.outputs)
        )

    # ---- running -----------------------------------------------------------------------------------------------

    def _run_block(
        self, block: Block, inputs: Sequence[EngineValue], outer: _Scope | None, sink: Sink
    ) -> list[EngineValue]:
        scope = _Scope(self.engine, outer)
        for value, given in zip(block.graph.inputs, inputs, strict=True):
            scope.values[value] = given
            self._look(value, given, sink)
        for step, dying in zip(block.steps, block.dying, strict=True):
            if isinstance(step, Segment):
                self._run_segment(step, scope, sink)
            else:
                self._run_control(step, scope, sink)
            for value in dying:
                scope.values.pop(value, None)
        return [scope[v] for v in block.graph.outputs] if outer is not None else []

    def _look(self, value: ir.Value, given: EngineValue, sink: Sink) -> int:
        """Hand a value to the sink if it is a looked-at float tensor, and return its bytes."""
        if not self._looked_at(value):
            return 0
        found = given.type
        if not isinstance(found, ir.TensorType) or found.dtype not in _FLOATS:
            return 0
        array = given.array()
        sink(str(value.name), array)
        return int(array.nbytes)

    def _run_segment(self, segment: Segment, scope: _Scope, sink: Sink) -> None:
        if not segment.outputs:
            return  # nobody reads what it gives
        values = {str(v.name): scope[v] for v in segment.inputs}
        made = self._runner(segment, values).run_values(values, [str(v.name) for v in segment.outputs])
        sizes: dict[str, int] = {}
        for value in segment.outputs:
            given = made.pop(str(value.name))
            sizes[str(value.name)] = self._look(value, given, sink)
            scope.values[value] = given
        if sum(sizes.values()) > 2 * self.limit and sum(map(bool, sizes.values())) > 1:
            self._regroup(sizes)

    def _regroup(self, sizes: Mapping[str, int]) -> None:
        """Cut anew from the next feed on: this one was larger than the sizes that the cuts were made for."""
        with self._lock:
            if any(size > self._sizes.get(name, 0) for name, size in sizes.items()):
                self._sizes |= {n: max(s, self._sizes.get(n, 0)) for n, s in sizes.items()}
                self._program = None
                self._runners = {}

    def _runner(self, segment: Segment, values: Mapping[str, EngineValue]) -> Runner:
        """Return the session of a segment for inputs of these types, which the graph need not declare."""
        types = tuple(repr(value.type) for value in values.values())
        with self._lock:
            runner = self._runners.get((segment, types))
            if runner is None:
                model = segment_model(segment, self.model, {n: v.type for n, v in values.items()})
                runner = self._runners[segment, types] = self.engine.load(model, self.options)
        return runner

    def _run_control(self, step: Control, scope: _Scope, sink: Sink) -> None:
        results: Sequence[EngineValue] | None
        if is_op(step.node, "If"):
            results = self._run_if(step, scope, sink)
        elif is_op(step.node, "Loop"):
            results = self._run_loop(step, scope, sink)
        else:
            results = self._run_scan(step, scope, sink)
        if results is None:
            self._run_segment(step.whole, scope, sink)
            return
        for value, given in zip(step.node.outputs, results, strict=True):
            if value in step.whole.outputs:
                self._look(value, given, sink)
                scope.values[value] = given

    def _run_if(self, step: Control, scope: _Scope, sink: Sink) -> list[EngineValue]:
        taken = "then_branch" if self._scalar(step.node.inputs[0], scope) else "else_branch"
        return self._run_block(step.bodies[taken], [], scope, sink)

    def _run_loop(self, step: Control, scope: _Scope, sink: Sink) -> list[EngineValue] | None:
        """Return what a Loop gives (ONNX operator specification, Loop-21), None if it makes no iteration."""
        most, condition, *initial = step.node.inputs
        trips = math.inf if most is None else int(self._scalar(most, scope))
        going = True if condition is None else bool(self._scalar(condition, scope))
        if trips <= 0 or not going:
            return None
        body = step.bodies["body"]
        state = [scope[v] for v in initial if v is not None]
        rows: list[list[Array]] = [[] for _ in step.node.outputs[len(state) :]]
        count = 0
        while going and count < trips:
            counter, flag = self._counters(body, count, going)
            given, *results = self._run_block(body, [counter, flag, *state], scope, sink)
            going, state = bool(given.array().reshape(-1)[0]), results[: len(state)]
            for kept, value, result in zip(rows, step.node.outputs[len(state) :], results[len(state) :], strict=True):
                if value in step.whole.outputs:
                    kept.append(result.array().copy())
            count += 1
        return [*state, *(self.engine.value(np.stack(kept) if kept else np.zeros(0, np.float32)) for kept in rows)]

    def _counters(self, body: Block, count: int, going: bool) -> Iterator[EngineValue]:
        """Yield a Loop's iteration number and condition, of rank 1 where the body declares them so."""
        for value, number in zip(body.graph.inputs, (np.array(count, np.int64), np.array(going)), strict=False):
            ranked = value.shape is not None and len(value.shape) == 1
            yield self.engine.value(number.reshape(1) if ranked else number)

    def _run_scan(self, step: Control, scope: _Scope, sink: Sink) -> list[EngineValue] | None:
        """Return what a Scan gives (ONNX operator specification, Scan-21), None if it makes no iteration."""
        node = step.node
        count = attr_int(node, "num_scan_inputs", 0)
        given = [scope[v] for v in node.inputs if v is not None]
        state, scanned = given[: len(given) - count], [v.array() for v in given[len(given) - count :]]
        rows: list[list[Array]] = [[] for _ in node.outputs[len(state) :]]
        axes = attr_ints(node, "scan_input_axes") or (0,) * count
        backwards = attr_ints(node, "scan_input_directions") or (0,) * count
        length = scanned[0].shape[axes[0]]
        if length == 0:
            return None
        for index in range(length):
            slices = [
                np.asarray(a.take(length - 1 - index if back else index, axis), order="C")
                for a, axis, back in zip(scanned, axes, backwards, strict=True)
            ]
            inputs = [*state, *map(self.engine.value, slices)]
            results = self._run_block(step.bodies["body"], inputs, scope, sink)
            state = results[: len(state)]
            for kept, result in zip(rows, results[len(state) :], strict=True):
                kept.append(result.array().copy())
        out_axes = attr_ints(node, "scan_output_axes") or (0,) * len(rows)
        out_backwards = attr_ints(node, "scan_output_directions") or (0,) * len(rows)
        stacked = [
            np.stack(kept[::-1] if back else kept, axis)
            for kept, axis, back in zip(rows, out_axes, out_backwards, strict=True)
        ]
        return [*state, *map(self.engine.value, stacked)]

    def _scalar(self, value: ir.Value | None, scope: _Scope) -> float:
        assert value is not None
        return float(scope[value].array().reshape(-1)[0])


def _is_half(node: ir.Node) -> bool:
    """Return whether a node gives numbers of half precision: those end a piece.

    Engines without kernels for them compute in float32 and leave out the rounding between two nodes of one session, so
    that numbers would depend on where the cuts are.
    """
    return any(v.dtype in _HALVES for v in node.outputs)


def bodies_of(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs in a node's attributes."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _reads(nodes: Sequence[ir.Node]) -> Iterator[ir.Value]:
    """Yield what nodes read, their bodies' captures included, less what bodies define themselves."""
    for node in nodes:
        yield from (v for v in node.inputs if v is not None)
        for body in bodies_of(node):
            own = set(body.inputs) | {v for inner in body for v in inner.outputs} | set(body.initializers.values())
            yield from (v for v in _reads(list(body)) if v not in own)
            yield from (v for v in body.outputs if v not in own)


def segment_model(segment: Segment, model: ir.Model, types: Mapping[str, ir.TypeProtocol]) -> ir.Model:
    """Return a segment as a model whose inputs have the given types and open shapes."""
    view = ir.GraphView(
        segment.inputs, segment.outputs, nodes=segment.nodes, initializers=segment.constants,
        opset_imports=model.graph.opset_imports, name="segment",
    )  # fmt: skip
    graph = view.clone()
    for value in graph.inputs:
        value.type, value.shape = types[str(value.name)], None
    made = ir.Model(graph, ir_version=model.ir_version)
    made.functions.update(model.functions)
    return made


def estimated_sizes(model: ir.Model, names: Collection[str], feed: Feeds) -> dict[str, int]:
    """Estimate the bytes of the named values when the model runs on a feed.

    The lengths of named axes are read off the inputs; other open axes take the longest of those, and a value of unknown
    rank counts as large as the largest one known.
    """
    lengths: dict[str, int] = {}
    for value in model.graph.inputs:
        if value.shape is not None and value.name is not None and value.name in feed:
            axes = zip(value.shape, np.asarray(feed[value.name]).shape, strict=False)
            lengths.update({str(d.value): n for d, n in axes if isinstance(d, ir.SymbolicDim) and d.value is not None})
    longest = max(lengths.values(), default=1)
    found = [v for node in model.graph.all_nodes() for v in node.outputs if v.name in names]
    sizes: dict[str, int] = {}
    for value in found:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else lengths.get(str(d.value), longest) for d in value.shape]
            sizes[str(value.name)] = math.prod(dims) * 4
    largest = max(sizes.values(), default=0)
    return {str(v.name): sizes.get(str(v.name), largest) for v in found}

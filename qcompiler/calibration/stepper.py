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

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.segments import (
    HALVES,
    SCAN_WITHOUT_BATCH,
    Block,
    Control,
    Cutter,
    Segment,
    estimated_sizes,
    segment_model,
)
from qcompiler.engine import Array, Engine, EngineOptions, EngineValue, Feeds, Runner
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import attr_int, attr_ints, is_op

Sink = Callable[[str, Array], None]
"""Takes the name of a looked-at value and its numbers, which are valid during the call only."""

_FLOATS = (ir.DataType.FLOAT, *HALVES)


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
    _wanted: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._wanted = frozenset(self.names)

    def run(self, feed: Feeds, sink: Sink) -> None:
        """Run one feed and hand every looked-at value to the sink, once for each time it is computed."""
        with self._lock:
            if self._program is None:
                self._sizes = estimated_sizes(self.model, self._wanted, feed) | self._sizes
                opset = self.model.graph.opset_imports.get("", SCAN_WITHOUT_BATCH)
                cutter = Cutter(self._wanted, self._sizes, self.limit, opset)
                self._program = cutter.block(self.model.graph, needed=())
            program = self._program
        inputs = [self.engine.value(np.asarray(feed[str(v.name)])) for v in self.model.graph.inputs]
        self._run_block(program, inputs, None, sink)

    @property
    def segments(self) -> int:
        """Return into how many pieces the main graph is cut, 0 before the first run."""
        return 0 if self._program is None else len(self._program.steps)

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
        if value.name not in self._wanted:
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

"""A program for inputs of given shapes: what is left to do, where every buffer lies, what it moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from qcompiler.backends.triton.arena import assign_offsets, find_lifetimes, peak_bytes
from qcompiler.backends.triton.operators import VIEWS
from qcompiler.backends.triton.program import CONTROL, Program, Step
from qcompiler.backends.triton.shapes import Tensor, dtype_of_array, infer
from qcompiler.engine import Array

SMALL = 4096
"""Weights of at most so many elements are read while planning: shapes, axes, steps."""


@dataclass(frozen=True)
class Buffer:
    """Where a value lies.

    Attributes:
        name: of the value.
        dtype: element type.
        shape: lengths; None if they depend on data.
        offset: bytes from the arena's start, -1 if it does not lie there.
        view_of: value whose memory it is under another shape, or empty.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    offset: int = -1
    view_of: str = ""

    @property
    def nbytes(self) -> int:
        """Return its size, 0 if unknown."""
        return Tensor(self.dtype, self.shape).nbytes


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        steps: in order; what depends on shapes alone was computed while planning.
        buffers: of every value that a step writes, and of the inputs.
        constants: what was computed while planning.
        outputs: names of the results.
        arena: bytes of the block that the buffers lie in.
        peak: bytes that are needed at one time at most: no arena is smaller.
        unplanned: values whose shape depends on data; they are allocated at run time.
    """

    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    constants: Mapping[str, Array]
    outputs: tuple[str, ...]
    arena: int
    peak: int
    unplanned: tuple[str, ...] = ()


@dataclass
class _Tracer:
    """Walks a program and notes what is known of every value."""

    program: Program
    known: dict[str, Tensor]
    steps: list[Step] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    alias: dict[str, str] = field(default_factory=dict)

    def weigh(self, weights: Mapping[str, Array]) -> None:
        """Note the weights; contents of small ones may be needed for shapes."""
        for name, array in weights.items():
            contents = array if array.size <= SMALL else None
            self.known[name] = Tensor(dtype_of_array(array), array.shape, contents)

    def walk(self, program: Program, names: Mapping[str, str] | None = None) -> None:
        """Visit all steps; a branch that is known to be taken is visited in place."""
        self.weigh(program.weights)
        for step in program.steps:
            inputs = [self.known.get(n, Tensor("", None)) if n else None for n in step.inputs]
            taken = self._taken(step, inputs)
            if taken is not None:
                self._inline(step, taken)
                continue
            if step.kind == CONTROL:
                made = [Tensor("", None) for _ in step.outputs]
            else:
                made = infer(step, inputs, self._all_weights(program), program.opset)
            folded = all(t.contents is not None or not n for n, t in zip(step.outputs, made, strict=True))
            for name, tensor in zip(step.outputs, made, strict=True):
                if name:
                    self.known[name] = tensor
                    if folded and tensor.contents is not None:
                        self.constants[name] = tensor.contents
            if not folded or step.kind == CONTROL:
                self.steps.append(step)

    def _all_weights(self, program: Program) -> Mapping[str, Array]:
        return program.weights if program is self.program else {**self.program.weights, **program.weights}

    def _taken(self, step: Step, inputs: list[Tensor | None]) -> Program | None:
        if step.operator != "If" or step.kind != CONTROL or inputs[0] is None or inputs[0].contents is None:
            return None
        return step.bodies["then_branch" if bool(inputs[0].contents.reshape(-1)[0]) else "else_branch"]

    def _inline(self, step: Step, body: Program) -> None:
        self.walk(body)
        for name, port in zip(step.outputs, body.outputs, strict=True):
            if name:
                copy = Step(f"{step.name}:{name}", "torch", "Identity", (port.name,), (name,))
                self.known[name] = self.known.get(port.name, Tensor("", None))
                contents = self.known[name].contents
                if contents is not None:
                    self.constants[name] = contents
                else:
                    self.steps.append(copy)


def make_plan(program: Program, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """Plan a program for inputs of given shapes.

    Args:
        program: for any shapes.
        shapes: of every input.
    """
    tracer = _Tracer(program, {})
    for port in program.inputs:
        tracer.known[port.name] = Tensor(port.dtype, tuple(shapes[port.name]))
    tracer.walk(program)
    outputs = tuple(p.name for p in program.outputs)
    steps = _needed(tracer.steps, outputs)
    inputs = {p.name for p in program.inputs}
    root = _roots(steps, tracer.known)
    written = {n: s for s in steps for n in s.outputs if n}
    sizes = {
        n: tracer.known[n].nbytes
        for n, s in written.items()
        if s.kind != CONTROL and tracer.known[n].shape is not None and tracer.known[n].nbytes and root.get(n, n) == n
    }
    writes = [[n for n in s.outputs if n in sizes] for s in steps]
    reads = [[r for n in s.reads if (r := root.get(n, n)) in sizes] for s in steps]
    kept = [r for n in outputs if (r := root.get(n, n)) in sizes]
    lifetimes = find_lifetimes(sizes, writes, reads, kept)
    offsets, arena = assign_offsets(lifetimes)
    buffers = {}
    for name in (*inputs, *written):
        tensor, base = tracer.known[name], root.get(name, name)
        offset = offsets.get(base, -1)
        buffers[name] = Buffer(name, tensor.dtype, tensor.shape, offset, "" if base == name else base)
    needed = {n for s in steps for n in s.reads} | set(outputs)
    constants = {n: np.ascontiguousarray(a).reshape(a.shape) for n, a in tracer.constants.items() if n in needed}
    unplanned = tuple(n for n in written if tracer.known[n].shape is None)
    return Plan(tuple(steps), buffers, constants, outputs, arena, peak_bytes(lifetimes), unplanned)


def _needed(steps: list[Step], outputs: tuple[str, ...]) -> list[Step]:
    """Return the steps that the outputs depend on."""
    wanted = set(outputs)
    kept = []
    for step in reversed(steps):
        if any(n in wanted for n in step.outputs):
            kept.append(replace(step, outputs=tuple(n if n in wanted else "" for n in step.outputs)))
            wanted.update(step.reads)
    return kept[::-1]


def _roots(steps: list[Step], known: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each value that is another's memory under another shape, and whose it is."""
    root: dict[str, str] = {}
    for step in steps:
        if (
            step.kind == "torch"
            and step.operator in VIEWS
            and step.outputs[0]
            and known[step.outputs[0]].shape is not None
        ):
            source = step.inputs[0]
            root[step.outputs[0]] = root.get(source, source)
    return root

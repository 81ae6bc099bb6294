"""Run plans on torch tensors: on a CPU by references, interpreted, or on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.backends.triton.buckets import Buckets
from qcompiler.backends.triton.control import run_control
from qcompiler.backends.triton.operators import VIEWS
from qcompiler.backends.triton.plan import Plan, make_plan
from qcompiler.backends.triton.program import CONTROL, KERNEL, TENSOR, Port, Program, Step
from qcompiler.backends.triton.references import REFERENCES
from qcompiler.backends.triton.tensors import TYPES, to_numpy, to_torch
from qcompiler.backends.triton.torch_ops.call import Call, Memo
from qcompiler.backends.triton.torch_ops.catalog import FUNCTIONS
from qcompiler.engine import Array, EngineValue, Feeds, TensorInfo
from qcompiler.errors import CalibrationError, ModelError

MOST_PLANS = 16
"""Plans that are kept, by the shapes of the inputs; the one that was used longest ago goes first."""


@dataclass
class Prepared:
    """A plan with its memory.

    Attributes:
        plan: what to do.
        constants: what was computed while planning, on the device.
        views: the arena as tensors, by value.
        memos: what torch functions keep, by the name of their first output.
        graph: what a device captured of it.
        eager: whether it cannot be captured.
    """

    plan: Plan
    constants: dict[str, Tensor]
    views: dict[str, Tensor]
    memos: dict[str, Memo] = field(default_factory=dict)
    graph: Any = None
    eager: bool = False


@dataclass
class Executor:
    """Runs a program.

    Attributes:
        program: for any shapes.
        device: torch's name of the device.
        launcher: launches a kernel, or None where references compute.
    """

    program: Program
    device: str = "cpu"
    launcher: Any = None
    plans: OrderedDict[tuple[Any, ...], Prepared] = field(default_factory=OrderedDict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Move the weights to the device, those of bodies too."""
        self._weigh(self.program)

    def _weigh(self, program: Program) -> None:
        for name, array in program.weights.items():
            self.weights[name] = to_torch(array).to(self.device)
        for step in program.steps:
            for body in step.bodies.values():
                self._weigh(body)

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> Prepared:
        """Return the plan for inputs of these shapes, made if it is not kept."""
        key = tuple(sorted(shapes.items()))
        if key in self.plans:
            self.plans.move_to_end(key)
            return self.plans[key]
        plan = make_plan(self.program, shapes)
        constants = {name: to_torch(array).to(self.device) for name, array in plan.constants.items()}
        arena = torch.empty(plan.arena, dtype=torch.uint8, device=self.device)
        views = {}
        for buffer in plan.buffers.values():
            if buffer.offset >= 0 and not buffer.view_of and buffer.shape is not None:
                dtype = TYPES[buffer.dtype]
                block = arena[buffer.offset : buffer.offset + buffer.nbytes]
                views[buffer.name] = block.view(dtype).reshape(buffer.shape)
        prepared = Prepared(plan, constants, views)
        self.plans[key] = prepared
        while len(self.plans) > MOST_PLANS:
            self.plans.popitem(last=False)
        return prepared

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run once; the results are copies that no later run changes."""
        values = {name: to_torch(array).to(self.device) for name, array in feeds.items()}
        prepared = self.prepare({name: tuple(v.shape) for name, v in values.items()})
        values |= prepared.constants
        return self.run_prepared(prepared, values)

    def run_prepared(self, prepared: Prepared, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run a plan on values that lie on the device."""
        last = _last_reads(prepared.plan)
        for index, step in enumerate(prepared.plan.steps):
            self.execute(step, values, prepared)
            for name in last.get(index, ()):
                values.pop(name, None)
        found = {}
        for name in prepared.plan.outputs:
            value = values[name] if name in values else self.weights[name]
            found[name] = value.clone()
        return found

    def execute(self, step: Step, values: dict[str, Tensor], prepared: Prepared | None) -> None:
        """Run one step, and keep its results where the plan has them."""
        inputs = [self._value(n, values) if n else None for n in step.inputs]
        if step.kind == CONTROL:
            made = run_control(self, step, inputs, values)
        elif step.kind == KERNEL:
            made = self._kernel(step, inputs, prepared)
        else:
            made = self._torch(step, inputs, self._memo(step, prepared))
        for name, tensor in zip(step.outputs, made, strict=False):
            if name:
                values[name] = self._keep(step, name, tensor, prepared)

    def _memo(self, step: Step, prepared: Prepared | None) -> Memo:
        """Return what a step keeps between runs of a plan; in a body, where nothing is planned, it keeps nothing."""
        if prepared is None:
            return Memo()
        key = next(name for name in step.outputs if name)
        if key not in prepared.memos:
            fixed = {i for i, n in enumerate(step.inputs) if n in self.weights or n in prepared.constants}
            prepared.memos[key] = Memo(frozenset(fixed))
        return prepared.memos[key]

    def _keep(self, step: Step, name: str, tensor: Tensor, prepared: Prepared | None) -> Tensor:
        if tensor.device.type != torch.device(self.device).type:
            tensor = tensor.to(self.device)  # a shape, or a constant that a body makes
        view = None if prepared is None else prepared.views.get(name)
        if view is None or tensor is view:
            return tensor
        if tensor.shape != view.shape or tensor.dtype != view.dtype:
            raise ModelError(
                f"{step.name} ({step.operator}) gives {tensor.dtype} {tuple(tensor.shape)} for {name}; the plan has "
                f"{view.dtype} {tuple(view.shape)}"
            )
        return view.copy_(tensor)

    def _value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        found = values.get(name)
        return self.weights[name] if found is None else found

    def _torch(self, step: Step, inputs: Sequence[Tensor | None], memo: Memo) -> tuple[Tensor, ...]:
        attributes = {
            k: self.weights[v.removeprefix(TENSOR)] if isinstance(v, str) and v.startswith(TENSOR) else v
            for k, v in step.attributes.items()
        }
        wanted = sum(1 for _ in step.outputs)
        if step.operator in VIEWS and inputs[0] is not None and not inputs[0].is_contiguous():
            inputs = [inputs[0].contiguous(), *inputs[1:]]
        return FUNCTIONS[step.operator](Call(step.operator, inputs, attributes, wanted, self.program.opset, memo))

    def _kernel(self, step: Step, inputs: Sequence[Tensor | None], prepared: Prepared | None) -> tuple[Tensor, ...]:
        given: dict[str, Any] = dict(step.attributes)
        if "residual" in given:
            given["residual_when"] = given.pop("residual")
        given |= {n: t.contiguous() for n, t in zip(step.arguments, inputs, strict=True) if t is not None}
        if self.launcher is not None:
            outs = [None if prepared is None else prepared.views.get(n) for n in step.outputs]
            made = self.launcher(step, given, outs)
            if made is not None:
                return tuple(made)
        return REFERENCES[step.operator](given)


def _last_reads(plan: Plan) -> dict[int, list[str]]:
    """Return the values that may go after each step."""
    last: dict[str, int] = {}
    for index, step in enumerate(plan.steps):
        for name in step.reads:
            last[name] = index
    kept = {*plan.outputs, *plan.constants}
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            found.setdefault(index, []).append(name)
    return found


@dataclass
class TritonRunner:
    """A loaded model: NumPy, torch or DLPack arrays in, the same kind out.

    Attributes:
        executor: runs the program.
        buckets: lengths to which open axes are filled up.
    """

    executor: Executor
    buckets: Buckets = field(default_factory=Buckets)

    def __post_init__(self) -> None:
        """Check that the buckets are for this model."""
        self.buckets.check(self.executor.program.inputs, self.executor.program.outputs)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Return what a caller feeds."""
        return tuple(_info(p) for p in self.executor.program.inputs)

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Return what a run gives."""
        return tuple(_info(p) for p in self.executor.program.outputs)

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Run once and return the named outputs (all by default), as torch tensors if the feeds are.

        Raises:
            CalibrationError: a feed is missing, superfluous, or of another type or rank than the model's input.
        """
        self._check(feeds)
        with torch.inference_mode():
            found = self._run(feeds)
        tensors = any(isinstance(v, Tensor) for v in feeds.values())
        names = [p.name for p in self.executor.program.outputs] if outputs is None else list(outputs)
        if unknown := [n for n in names if n not in found]:
            raise CalibrationError(f"the model has no output {unknown[0]!r}; it has {', '.join(found)}")
        made: dict[str, Any] = {n: found[n] if tensors else to_numpy(found[n]) for n in names}
        return made

    def _run(self, feeds: Feeds) -> dict[str, Tensor]:
        if not self.buckets.lengths:
            return self.executor.run(feeds)
        program = self.executor.program
        given, true = self.buckets.fill({n: to_torch(a) for n, a in feeds.items()}, program.inputs)
        found = self.executor.run(given)
        return self.buckets.cut(found, program.outputs, true) if true else found

    def run_values(self, values: Mapping[str, EngineValue], outputs: Sequence[str]) -> dict[str, EngineValue]:
        """Refuse: the executor has no values of its own.

        Raises:
            ModelError: always.
        """
        raise ModelError("the Triton executor has no values of its own; call run with arrays")

    def _check(self, feeds: Feeds) -> None:
        ports = {p.name: p for p in self.executor.program.inputs}
        if set(feeds) != set(ports):
            raise CalibrationError(
                f"the model's inputs are {', '.join(ports) or 'none'}; the feed has {', '.join(feeds) or 'none'}"
            )
        for name, array in feeds.items():
            port, shape = ports[name], tuple(np.shape(array))
            dtype = to_torch(array).dtype
            if port.dtype and dtype is not TYPES[port.dtype]:
                raise CalibrationError(f"input {name} is {port.dtype}; the feed has {dtype}")
            wrong = port.shape is not None and (
                len(port.shape) != len(shape)
                or any(isinstance(a, int) and a != b for a, b in zip(port.shape, shape, strict=True))
            )
            if wrong:
                raise CalibrationError(f"input {name} has the shape {port.shape}; the feed has {shape}")


def _info(port: Port) -> TensorInfo:
    dtype = np.dtype(port.dtype) if port.dtype in np.sctypeDict else np.dtype(np.float32)
    return TensorInfo(port.name, dtype, port.shape)

"""Compare the steps of a model compiled for Triton with ONNX Runtime on the same graph, one by one.

The lowered model's twin says the same in plain Q/DQ and is run without optimizations. Values have the same names in
both; one that lies with its channels behind carries that in its name. Every step reads what ONNX Runtime computed, so a
difference is that of the step alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.backends.tensorrt.backend import PlainOrtEngine
from qcompiler.backends.triton.executor import Executor, Prepared
from qcompiler.backends.triton.kernel_calls import has_kernel
from qcompiler.backends.triton.plan import Plan
from qcompiler.backends.triton.program import KERNEL, Step, build_program
from qcompiler.backends.triton.tensors import to_numpy, to_torch
from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.engine import EngineOptions, Feeds, Runner
from qcompiler.passes.assign_channels_last import NHWC, TO_LAST

Array = npt.NDArray[Any]
_INTEGERS = ("int8", "uint8")


@dataclass
class StepGap:
    """What one step gives against ONNX Runtime's value.

    Attributes:
        step: its name.
        kernel: its operator.
        dtype: of its result; for floats a step is 1/255 of the range.
        values: compared.
        one: values that differ, by one step at most.
        more: values that differ by more.
    """

    step: str
    kernel: str
    dtype: str
    values: int = 0
    one: int = 0
    more: int = 0

    @property
    def share(self) -> float:
        """Return the share of values that differ."""
        return (self.one + self.more) / max(self.values, 1)

    def add(self, found: Array, wanted: Array) -> None:
        """Count the differences of one run."""
        unit = 1.0 if self.dtype in _INTEGERS else float(np.ptp(wanted.astype(np.float64))) / 255 or 1.0
        steps = np.abs(found.astype(np.float64) - wanted.astype(np.float64)) / unit
        self.values += steps.size
        self.one += int(((steps > 0.5) & (steps <= 1.0)).sum())
        self.more += int((steps > 1.0).sum())


def twin_of(job: Compilation, made: CompiledModel) -> ir.Model:
    """Return what ONNX Runtime runs of a build, in plain Q/DQ."""
    forms = {**job.workshop.engine_forms, **made.decisions.engine_forms}
    return job.workshop.computable(job.workshop.build(made.decisions.forms, forms))


def count_steps(plan: Plan) -> dict[str, int]:
    """Return how many steps are kernels, torch functions in place of kernels, and torch functions."""
    kinds = [
        ("kernels" if has_kernel(s.operator) else "stand-ins") if s.kind == KERNEL else "torch" for s in plan.steps
    ]
    return {kind: kinds.count(kind) for kind in ("kernels", "stand-ins", "torch")}


def compare_steps(model: ir.Model, twin: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> list[StepGap]:
    """Return every kernel's gap over all feeds.

    Args:
        model: LOWERED.
        twin: the same in Q/DQ.
        feeds: inputs by name.
    """
    executor = Executor(build_program(model))
    names = {n for s in executor.program.steps for n in (*s.inputs, *s.outputs) if n}
    reference = _Reference(twin, {n.removesuffix(NHWC) for n in names})
    gaps: dict[str, StepGap] = {}
    for feed in feeds:
        wanted = reference.run(feed)
        values = {name: to_torch(array) for name, array in feed.items()}
        prepared = executor.prepare({name: tuple(v.shape) for name, v in values.items()})
        values |= prepared.constants
        prepared.views.clear()  # every result in memory of its own
        for step in prepared.plan.steps:
            executor.execute(step, values, prepared)
            _compare(step, values, wanted, gaps, prepared)
    return list(gaps.values())


def _compare(
    step: Step, values: dict[str, Any], wanted: Mapping[str, Array], gaps: dict[str, StepGap], prepared: Prepared
) -> None:
    for name in step.outputs:
        if name.removesuffix(NHWC) not in wanted:
            continue
        array = wanted[name.removesuffix(NHWC)]
        if name.endswith(NHWC):
            array = np.ascontiguousarray(array.transpose(TO_LAST))
        found = to_numpy(values[name])
        if found.shape != array.shape:
            raise AssertionError(f"{step.name}: {found.shape} here, {array.shape} on ONNX Runtime")
        if step.kind == KERNEL:
            gap = gaps.setdefault(step.name, StepGap(step.name, step.operator, found.dtype.name))
            gap.add(found, array)
        values[name] = to_torch(array.astype(found.dtype))


class _Scaled:
    """A runner that sees inputs times a factor."""

    def __init__(self, runner: Runner, factor: float) -> None:
        self.runner, self.factor = runner, np.float32(factor)

    def run(self, feed: Feeds) -> dict[str, Array]:
        return self.runner.run({n: a * self.factor if a.dtype == np.float32 else a for n, a in feed.items()})


def nudged(twin: ir.Model, factor: float) -> Any:
    """Return ONNX Runtime on a twin whose inputs are larger by a factor; where tokens go in, whose embeddings are.

    What no metric should hang on shows how far one step that falls the other way is carried.
    """
    plain = PlainOrtEngine().load(twin)
    if any(i.dtype == np.float32 for i in plain.inputs):
        return _Scaled(plain, factor)
    copy = twin.clone()
    for node in copy.graph:
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is not None and table.const_value is not None and table.dtype is ir.DataType.FLOAT:
            table.const_value = ir.tensor(table.const_value.numpy() * np.float32(factor), name=table.name)
    return PlainOrtEngine().load(copy)


class _Reference:
    """Runs a twin and gives inner values, too; in one thread, so that sums of floats have one order on any machine."""

    def __init__(self, twin: ir.Model, names: set[str]) -> None:
        model = twin.clone()
        known = {v.name for v in model.graph.outputs}
        for node in model.graph:
            for value in node.outputs:
                if value.name in names and value.name not in known and value.dtype is not None:
                    model.graph.outputs.append(value)
        self._runner = PlainOrtEngine().load(model, EngineOptions(threads=1))

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        return self._runner.run(feed)

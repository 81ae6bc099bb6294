"""A plan as text: one line per step with its kernel, its shapes, the bytes that it moves, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qcompiler.backends.triton.kernel_calls import has_kernel, kernel_call, output_names
from qcompiler.backends.triton.operators import VIEWS
from qcompiler.backends.triton.plan import Plan, make_plan
from qcompiler.backends.triton.program import CONTROL, KERNEL, Program, Step
from qcompiler.backends.triton.shapes import Tensor
from qcompiler.backends.triton.work import count_work, known_values
from qcompiler.errors import QCompilerError
from qcompiler.kernels.operand import ITEMSIZE, Operand

_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "s8", "uint8": "u8", "int32": "i32",
          "int64": "i64", "float8e4m3fn": "e4m3"}  # fmt: skip
_EPILOGUE = ("bias", "residual", "activation", "out")


def render_plan(program: Program, sm: int, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the plan for inputs of these shapes as text; the last line sums up."""
    plan = make_plan(program, shapes)
    known = known_values(plan, program)
    lines = [f"plan for sm{sm}: " + ", ".join(f"{n} {_shape(s)}" for n, s in shapes.items())]
    total = [0, 0]
    for index, step in enumerate(plan.steps):
        read, written, exact = _bytes(step, known)
        total[0] += read
        total[1] += written
        moved = f"{_size(read)} -> {_size(written)}" if exact else "bytes depend on data"
        columns = f"{_what(step):44} {_operands(step, known):56} {moved:24} {_config(step, known, sm):20}"
        lines.append(f"{index:4} {columns} {step.name}")
    lines.append(_summary(plan, program, total))
    return "\n".join(lines) + "\n"


def _what(step: Step) -> str:
    """Return the kernel with what is fused behind it."""
    if step.kind == KERNEL and not has_kernel(step.operator):
        return (
            f"{step.operator}[{step.attributes['op']}] (torch)"
            if "op" in step.attributes
            else f"{step.operator} (torch)"
        )
    if step.kind != KERNEL:
        return f"{step.operator} (host)" if step.kind == CONTROL else f"{step.operator} (torch)"
    parts = [f"{k}={step.attributes[k]}" for k in _EPILOGUE if step.attributes.get(k) not in (None, "none")]
    if "op" in step.attributes:
        parts.insert(0, str(step.attributes["op"]))
    return f"{step.operator}[{' '.join(parts)}]" if parts else step.operator


def _operands(step: Step, known: Mapping[str, Tensor]) -> str:
    reads = ", ".join(_tensor(known.get(n)) for n in step.inputs[:2] if n)
    more = f" +{len([n for n in step.inputs if n]) - 2}" if len([n for n in step.inputs if n]) > 2 else ""
    return f"{reads}{more} -> {', '.join(_tensor(known.get(n)) for n in step.outputs if n)}"


def _tensor(tensor: Tensor | None) -> str:
    if tensor is None or tensor.shape is None:
        return "?"
    return f"{_SHORT.get(tensor.dtype, tensor.dtype)}{_shape(tensor.shape)}"


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{'x'.join(map(str, shape))}]"


def _bytes(step: Step, known: Mapping[str, Tensor]) -> tuple[int, int, bool]:
    """Return (bytes read, bytes written, whether both are known); a view moves nothing."""
    if step.operator in VIEWS:
        return 0, 0, True
    reads = [known.get(n) for n in step.reads]
    writes = [known.get(n) for n in step.outputs if n]
    exact = all(t is not None and t.shape is not None for t in (*reads, *writes))
    return sum(t.nbytes for t in reads if t is not None), sum(t.nbytes for t in writes if t is not None), exact


def _size(count: float) -> str:
    return _scaled(count, ("B", "KB", "MB", "GB"))


def _count(count: float) -> str:
    return _scaled(count, ("", "thousand", "million", "billion")).strip()


def _scaled(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}"


def _config(step: Step, known: Mapping[str, Tensor], sm: int) -> str:
    """Return the tile, warps and stages of a kernel's step, empty where it is no kernel."""
    if step.kind != KERNEL or not has_kernel(step.operator):
        return ""
    tensors = [known.get(n) for n in (*step.inputs, *(n for n in step.outputs if n))]
    if any(t is None or t.shape is None or t.dtype not in ITEMSIZE for t in tensors):
        return ""
    inputs = {a: _operand(known[n]) for a, n in zip(step.arguments, step.inputs, strict=True)}
    outputs = {a: _operand(known[n]) for a, n in zip(output_names(step), step.outputs, strict=False) if n}
    try:
        call = kernel_call(step, inputs, outputs)
        return "(torch)" if call is None else str(call.config(f"sm{sm}"))
    except QCompilerError as error:
        return f"({error})"


def _operand(tensor: Tensor) -> Operand:
    assert tensor.shape is not None
    return Operand(tensor.dtype, tensor.shape)


def _summary(plan: Plan, program: Program, total: list[int]) -> str:
    kernels = sum(s.kind == KERNEL and has_kernel(s.operator) for s in plan.steps)
    torch = sum(s.kind != CONTROL and s.operator not in VIEWS for s in plan.steps) - kernels
    views = sum(s.operator in VIEWS for s in plan.steps)
    host = sum(s.kind == CONTROL for s in plan.steps)
    weights = sum(math.prod(a.shape) * a.dtype.itemsize for a in program.weights.values())
    work = count_work(plan, program)
    parts = [
        f"{len(plan.steps)} steps: {kernels} kernels, {torch} torch functions, {views} views, {host} on the host",
        f"{_count(work.kernels + work.torch)} multiply-adds, {100 * work.share:.1f} % of them in kernels"
        + (f", {100 * work.quantized:.1f} % on stored numbers" if work.floats else "")
        + (f" ({work.unknown} products are not counted: their shapes depend on data)" if work.unknown else ""),
        f"reads {_size(total[0])}, writes {_size(total[1])}",
        f"weights {_size(weights)}, arena {_size(plan.arena)} (peak {_size(plan.peak)})",
    ]
    if plan.unplanned:
        parts.append(f"{len(plan.unplanned)} values have shapes that depend on data")
    return "; ".join(parts)

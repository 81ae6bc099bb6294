"""How many multiply-adds of a plan run in the project's kernels, and how many in torch functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qcompiler.backends.triton.kernel_calls import has_kernel, kernel_call, output_names
from qcompiler.backends.triton.plan import Plan
from qcompiler.backends.triton.program import KERNEL, TORCH, Program, Step
from qcompiler.backends.triton.shapes import Tensor, dtype_of_array
from qcompiler.errors import TargetError
from qcompiler.kernels.operand import ITEMSIZE, Operand

AVERAGES = "averages"
"""Attribute of a convolution that takes averages: sums, which nobody counts as multiply-adds."""
_PRODUCTS = (
    "int8_matmul", "fp8_matmul", "int4_matmul", "int4_matvec", "float_matmul", "int8_conv", "float_conv",
    "decode_attention",
)  # fmt: skip
_FLOATS = ("float_matmul", "float_conv")
_Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of products and convolutions of one plan.

    Attributes:
        kernels: in kernels of the project.
        torch: in torch functions.
        unknown: products whose shapes depend on data, or that stand in the body of a Loop or Scan.
        floats: of those in kernels, those of floats by floats.
    """

    kernels: int
    torch: int
    unknown: int = 0
    floats: int = 0

    @property
    def share(self) -> float:
        """Return the share of kernels; 1 where there is no product at all."""
        return self.kernels / (self.kernels + self.torch) if self.kernels + self.torch else 1.0

    @property
    def quantized(self) -> float:
        """Return the share of kernels that read stored numbers: both operands, or the weight; 1 where there is none."""
        whole = self.kernels + self.torch
        return (self.kernels - self.floats) / whole if whole else 1.0


def known_values(plan: Plan, program: Program) -> dict[str, Tensor]:
    """Return what is known of every value: of those that steps write, of weights, of what planning computed."""
    known = {n: Tensor(b.dtype, b.shape) for n, b in plan.buffers.items()}
    _weigh(program, known)
    return known | {n: Tensor(dtype_of_array(a), a.shape) for n, a in plan.constants.items()}


def _weigh(program: Program, known: dict[str, Tensor]) -> None:
    for name, array in program.weights.items():
        known[name] = Tensor(dtype_of_array(array), array.shape)
    for step in program.steps:
        for body in step.bodies.values():
            _weigh(body, known)


def count_work(plan: Plan, program: Program) -> Work:
    """Count the multiply-adds of a plan, for the shapes that it was made for."""
    known = known_values(plan, program)
    counts = {"kernels": 0, "torch": 0, "unknown": 0, "floats": 0}
    for step in plan.steps:
        for body in step.bodies.values():
            counts["unknown"] += sum(_multiplies(s) for s in body.all_steps())
        if not _multiplies(step):
            continue
        found = _of_kernel(step, known) if step.kind == KERNEL else _of_torch(step, known)
        if found is None:
            counts["unknown"] += 1
        else:
            counts[found[0]] += found[1]
            counts["floats"] += found[1] if found[0] == "kernels" and step.operator in _FLOATS else 0
    return Work(**counts)


def _multiplies(step: Step) -> bool:
    if step.kind == KERNEL:
        return step.operator in _PRODUCTS and AVERAGES not in step.attributes
    return step.kind == TORCH and step.operator in _TORCH


def _of_kernel(step: Step, known: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Return where a product runs, and its multiply-adds; shapes that its kernel does not take run in torch."""
    names = (*step.inputs, *(n for n in step.outputs if n))
    if any(known[n].shape is None or known[n].dtype not in ITEMSIZE for n in names):
        return None
    inputs = {a: _operand(known[n]) for a, n in zip(step.arguments, step.inputs, strict=True)}
    outputs = {a: _operand(known[n]) for a, n in zip(output_names(step), step.outputs, strict=False) if n}
    try:
        call = kernel_call(step, inputs, outputs) if has_kernel(step.operator) else None
    except TargetError:
        return None
    if call is None:
        a, out = inputs["a"].shape, outputs["out"].shape
        return "torch", math.prod(out) * a[-1]
    return "kernels", call.contract.macs(call.dims, call.options)


def _operand(tensor: Tensor) -> Operand:
    assert tensor.shape is not None
    return Operand(tensor.dtype, tensor.shape)


def _of_torch(step: Step, known: Mapping[str, Tensor]) -> tuple[str, int] | None:
    shapes = [known[n].shape for n in (*step.inputs[:2], step.outputs[0]) if n]
    if len(shapes) < 3 or any(s is None for s in shapes):
        return None
    first, second, out = (s for s in shapes if s is not None)
    return "torch", _TORCH[step.operator](first, second, out, step)


def _matmul(first: _Shape, second: _Shape, out: _Shape, step: Step) -> int:
    return math.prod(out) * first[-1]


def _gemm(first: _Shape, second: _Shape, out: _Shape, step: Step) -> int:
    return math.prod(out) * first[0 if step.attributes.get("transA", 0) else -1]


def _conv(first: _Shape, second: _Shape, out: _Shape, step: Step) -> int:
    return math.prod(out) * math.prod(second[1:])


def _transposed_conv(first: _Shape, second: _Shape, out: _Shape, step: Step) -> int:
    return math.prod(first) * math.prod(second[1:])


_TORCH: Mapping[str, Callable[[_Shape, _Shape, _Shape, Step], int]] = {
    "MatMul": _matmul, "MatMulInteger": _matmul, "Gemm": _gemm, "Conv": _conv, "ConvInteger": _conv,
    "ConvTranspose": _transposed_conv,
}  # fmt: skip
"""Multiply-adds of torch functions from the shapes of both operands and of the result."""

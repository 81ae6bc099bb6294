"""A step as a call of a kernel: its tensors in the shapes of the contract, its options and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qcompiler.backends.triton.program import Step
from qcompiler.kernels.catalog import contract_of, kernel_names
from qcompiler.kernels.config import Config, load_table
from qcompiler.kernels.contract import Contract
from qcompiler.kernels.operand import Operand

NUMBER = "_number"
"""Behind the name of a number in a step's attributes where an option of the kernel has the same name."""


@dataclass(frozen=True)
class KernelCall:
    """One call.

    Attributes:
        contract: of the kernel.
        options: complete.
        tensors: inputs, outputs and numbers by the contract's names.
        dims: length of each axis.
    """

    contract: Contract
    options: dict[str, str]
    tensors: dict[str, Any]
    dims: dict[str, int]

    def config(self, arch: str) -> Config:
        """Return the configuration that the kernel's table has for it."""
        return load_table(self.contract.name).choose(arch, self.dims, self.options)


def has_kernel(name: str) -> bool:
    """Return whether a step's operator is a kernel of the project, and not a function of the executor alone."""
    return name in kernel_names() and name in FRAMES


def kernel_call(step: Step, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> KernelCall:
    """Return a step as a call.

    Args:
        step: a kernel's step.
        inputs: tensors (or stand-ins) by argument, in the shapes of the model.
        outputs: the same, by the kernel's names of its outputs.

    Raises:
        TargetError: the contract does not allow it.
    """
    contract = contract_of(step.operator)
    names = {c.name for c in contract.choices}
    options = contract.options({k: str(v) for k, v in step.attributes.items() if k in names})
    tensors: dict[str, Any] = {}
    for name, tensor in {**inputs, **outputs}.items():
        shape = FRAMES[step.operator](name, tuple(tensor.shape), step)
        tensors[name] = tensor if shape is None else reshaped(tensor, shape)
    for argument in contract.arguments:
        if argument.role == "scalar" and argument.wanted(options):
            key = argument.name + NUMBER if argument.name in names else argument.name
            kind = int if argument.dtypes[0] == "int32" else float
            tensors[argument.name] = kind(step.attributes.get(key, 0))
    return KernelCall(contract, options, tensors, contract.check(tensors, options))


def reshaped(tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor, or a stand-in, under another shape."""
    return Operand(tensor.dtype, shape) if isinstance(tensor, Operand) else tensor.reshape(shape)


def output_names(step: Step) -> tuple[str, ...]:
    """Return a kernel's names of a step's outputs, in order."""
    return OUTPUTS.get(step.operator, ("out",))


def _product_frame(name: str, shape: tuple[int, ...], step: Step) -> tuple[int, ...] | None:
    return (1, math.prod(shape[:-1]), shape[-1]) if name in ("a", "residual", "out") else None


def _row_frame(name: str, shape: tuple[int, ...], step: Step) -> tuple[int, ...] | None:
    return (math.prod(shape[:-1]), shape[-1]) if name in ("x", "residual", "out", "kept", "normed") else None


FRAMES: Mapping[str, Callable[[str, tuple[int, ...], Step], tuple[int, ...] | None]] = {
    "int8_matmul": _product_frame, "fp8_matmul": _product_frame, "norm_quantize": _row_frame,
    "int8_conv": lambda name, shape, step: None,
}  # fmt: skip
"""Shapes that kernels want of tensors that models have in others; None leaves one as it is."""

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "norm_quantize": ("out", "normed", "kept"), "dynamic_quantize": ("q", "scale", "zero"),
}  # fmt: skip
"""Kernels' names of the outputs of steps that have several."""

"""A step as a call of a kernel: its tensors in the shapes of the contract, its options and its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.backends.triton.program import Step
from qcompiler.kernels.catalog import contract_of, kernel_names
from qcompiler.kernels.config import Config, load_table
from qcompiler.kernels.contract import Contract
from qcompiler.kernels.epilogue.contract import MOST_MATRICES
from qcompiler.kernels.int4_matvec.contract import MOST_ROWS
from qcompiler.kernels.int8_matmul.contract import MOST_TERMS
from qcompiler.kernels.norm_quantize.contract import MOST_COLUMNS
from qcompiler.kernels.operand import Operand
from qcompiler.kernels.pointwise.contract import collapse

TWO_BATCHES = 4
"""Axes of an operand of a product by strides whose batch has two."""
_STRIDED = ("int8_matmul", "float_matmul")
NUMBER = "_number"
"""Behind the name of a number in a step's attributes where an option of the kernel has the same name."""
Tensors = dict[str, Any]
Framed = tuple[str, Tensors]
"""A kernel's name, and tensors in the shapes that it wants."""


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


def kernels_of(operator: str) -> tuple[str, ...]:
    """Return the kernels that a step's operator may launch, by its shapes; none if it is torch's alone."""
    found = KERNELS.get(operator, (operator,) if operator in FRAMES else ())
    return found if set(found) <= set(kernel_names()) else ()


def has_kernel(operator: str) -> bool:
    """Return whether a step's operator is a kernel of the project, and not a function of the executor alone."""
    return bool(kernels_of(operator))


def kernel_call(step: Step, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> KernelCall | None:
    """Return a step as a call, None if no kernel takes these shapes.

    Args:
        step: a kernel's step.
        inputs: tensors (or stand-ins) by argument, in the shapes of the model.
        outputs: the same, by the kernel's names of its outputs.

    Raises:
        TargetError: the contract does not allow it.
    """
    framed = FRAMES[step.operator](_turned(step, {**inputs, **outputs}))
    if framed is None:
        return None
    kernel, tensors = framed
    contract = contract_of(kernel)
    names = {c.name for c in contract.choices}
    options = contract.options({k: str(v) for k, v in step.attributes.items() if k in names})
    if kernel in _STRIDED and len(tensors["a"].shape) == TWO_BATCHES:
        options["batch"] = "two"
    for argument in contract.arguments:
        if argument.role == "scalar" and argument.wanted(options):
            key = argument.name + NUMBER if argument.name in names else argument.name
            kind = int if argument.dtypes[0] == "int32" else float
            tensors[argument.name] = kind(step.attributes.get(key, 0))
    return KernelCall(contract, options, tensors, contract.check(tensors, options))


def _turned(step: Step, tensors: Tensors) -> Tensors:
    """Return tensors with their axes as the kernel counts them; a step says of some how a Transpose took them."""
    made = dict(tensors)
    for name, key in (("a", "a_axes"), ("w", "w_axes"), ("w_kn", "w_axes")):
        if key in step.attributes and name in made:
            made[name] = permuted(made[name], step.attributes[key])
    if "out_axes" in step.attributes:
        axes = list(step.attributes["out_axes"])
        made["out"] = permuted(made["out"], [axes.index(i) for i in range(len(axes))])
    return made


def permuted(tensor: Any, axes: Sequence[int]) -> Any:
    """Return a tensor, or a stand-in, with its axes in another order; nothing is copied."""
    if isinstance(tensor, Operand):
        return Operand(tensor.dtype, tuple(tensor.shape[i] for i in axes))
    return tensor.permute(*axes)


def reshaped(tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor, or a stand-in, under another shape."""
    return Operand(tensor.dtype, shape) if isinstance(tensor, Operand) else tensor.reshape(shape)


def expanded(tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor, or a stand-in, repeated to a shape; the tensor is copied."""
    return Operand(tensor.dtype, shape) if isinstance(tensor, Operand) else tensor.expand(shape).contiguous()


def output_names(step: Step) -> tuple[str, ...]:
    """Return a kernel's names of a step's outputs, in order."""
    return OUTPUTS.get(step.operator, ("out",))


def _integer_products(tensors: Tensors) -> Framed | None:
    return None if tensors["a"].shape[-1] > MOST_TERMS["kernel"] else _matrices("int8_matmul", tensors)


def _float_products(tensors: Tensors) -> Framed | None:
    return _matrices("float_matmul", tensors)


def _matrices(kernel: str, tensors: Tensors) -> Framed | None:
    """Multiply rows by one matrix, or matrices by matrices: what is the same for all is read again, by a stride of 0.

    A batch of more than two axes is brought under one.
    """
    a, name = tensors["a"], "w" if "w" in tensors else "w_kn"
    w = tensors[name]
    if all(n == 1 for n in w.shape[:-2]) and _packed(a) and _packed(tensors["out"]):
        return _products(kernel)(tensors | {name: reshaped(w, (1, *w.shape[-2:]))})
    batch = tuple(np.broadcast_shapes(tuple(a.shape[:-2]), tuple(w.shape[:-2])))
    if math.prod(batch) > MOST_MATRICES:
        return None
    framed = dict(tensors)
    for key in (k for k in ("a", name, "residual", "out") if k in framed):
        whole = (*batch, *framed[key].shape[-2:])
        spread = framed[key] if tuple(framed[key].shape) == whole else _spread(framed[key], whole)
        fits = 1 <= len(batch) <= TWO_BATCHES - 2
        framed[key] = spread if fits else reshaped(spread, (math.prod(batch), *whole[-2:]))
    return kernel, framed


def _packed(tensor: Any) -> bool:
    return isinstance(tensor, Operand) or bool(tensor.is_contiguous())


def _spread(tensor: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor, or a stand-in, under a shape that it is broadcast to; nothing is copied."""
    return Operand(tensor.dtype, shape) if isinstance(tensor, Operand) else tensor.expand(shape)


def _products(kernel: str) -> Callable[[Tensors], Framed | None]:
    def frame(tensors: Tensors) -> Framed | None:
        rows = math.prod(tensors["a"].shape[:-1])
        framed = {
            name: reshaped(t, (1, rows, t.shape[-1])) if name in ("a", "residual", "out") else t
            for name, t in tensors.items()
        }
        return kernel, framed

    return frame


def _blocks(tensors: Tensors) -> Framed | None:
    rows = math.prod(tensors["a"].shape[:-1])
    framed = {
        name: reshaped(t, (rows, t.shape[-1])) if name in ("a", "residual", "out") else t for name, t in tensors.items()
    }
    return ("int4_matvec" if rows <= MOST_ROWS else "int4_matmul"), framed


def _rows(tensors: Tensors) -> Framed | None:
    matrices = ("x", "residual", "out", "kept", "normed")
    framed = {
        n: reshaped(t, (math.prod(t.shape[:-1]), t.shape[-1])) if n in matrices else t for n, t in tensors.items()
    }
    return "norm_quantize", framed


def _one_row(tensors: Tensors) -> Framed | None:
    """Quantize a whole tensor as one row: its own range is that of the tensor."""
    size = math.prod(tensors["x"].shape)
    if not 0 < size <= MOST_COLUMNS:
        return None
    framed = {name: reshaped(t, (1, size) if name in ("x", "out") else (1,)) for name, t in tensors.items()}
    return "norm_quantize", framed


def _conv(kernel: str) -> Callable[[Tensors], Framed | None]:
    return lambda tensors: (kernel, dict(tensors))


def _pointwise(tensors: Tensors) -> Framed | None:
    """Bring tensors of any ranks under three axes; those that do not fit are repeated to the result's shape."""
    if "b" not in tensors:
        flat = {n: t if n == "table" else reshaped(t, (1, 1, math.prod(t.shape))) for n, t in tensors.items()}
        return "pointwise", flat
    a, b = tensors["a"], tensors["b"]
    shape = tuple(np.broadcast_shapes(tuple(a.shape), tuple(b.shape)))
    a = expanded(a, shape) if tuple(a.shape) != shape else a
    found = collapse(shape, [tuple(b.shape)])
    if found is None:
        b = expanded(b, shape)
        found = collapse(shape, [shape])
    assert found is not None
    whole, (other,) = found
    framed = {"a": reshaped(a, whole), "b": reshaped(b, other)}
    return "pointwise", framed | {n: reshaped(t, whole) for n, t in tensors.items() if n == "out"}


FRAMES: Mapping[str, Callable[[Tensors], Framed | None]] = {
    "int8_matmul": _integer_products, "fp8_matmul": _products("fp8_matmul"), "int4_matmul": _blocks,
    "float_matmul": _float_products, "int8_conv": _conv("int8_conv"), "float_conv": _conv("float_conv"),
    "norm_quantize": _rows, "dynamic_quantize": _one_row, "pointwise": _pointwise,
}  # fmt: skip
"""How the tensors of a step become those of a kernel, by its operator."""

KERNELS: Mapping[str, tuple[str, ...]] = {
    "int4_matmul": ("int4_matvec", "int4_matmul"), "dynamic_quantize": ("norm_quantize",),
}  # fmt: skip
"""Kernels of the operators that are not named as theirs."""

OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "norm_quantize": ("out", "normed", "kept"), "dynamic_quantize": ("out", "scales", "zeros"),
}  # fmt: skip
"""Kernels' names of the outputs of steps that have several."""

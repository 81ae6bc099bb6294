"""Make Triton's interpreter round as the devices do.

The interpreter (TRITON_INTERPRET=1, seen on Triton 3.6 and 3.9) loses the carry and the ties of casts to 8-bit floats,
truncates casts to bfloat16 and multiplies bfloat16 blocks by their bit patterns (triton issues 8322 and 11584).
Elementwise bfloat16 arithmetic stays wrong: kernels load, convert to float32, compute, and convert at the store.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from qcompiler.errors import TargetError


def interpreting() -> bool:
    """Return whether Triton interprets in this process (it reads the variable when it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def repair_interpreter() -> None:
    """Replace the interpreter's casts and its matrix product by right ones; harmless if done twice.

    Raises:
        TargetError: the process does not interpret.
    """
    if not interpreting():
        raise TargetError("Triton does not interpret in this process; set TRITON_INTERPRET=1 before it starts")
    from triton.runtime import interpreter

    interpreter._convert_float = _convert
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _dot
    # As the devices' min and max: a NaN yields the other operand.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


@contextmanager
def interpreted() -> Iterator[None]:
    """Silence what NumPy says of the interpreter's own code and of lanes that a mask drops, for launches inside."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
        yield


def _numpy_type(element: Any) -> np.dtype[Any] | None:
    """Return the NumPy dtype of a Triton element type that is stored as bits, or of any other float."""
    import triton.language as tl

    known: dict[Any, Any] = {
        tl.float8e4nv: ml_dtypes.float8_e4m3fn,
        tl.float8e5: ml_dtypes.float8_e5m2,
        tl.bfloat16: ml_dtypes.bfloat16,
        tl.float16: np.float16,
        tl.float32: np.float32,
        tl.float64: np.float64,
    }
    return np.dtype(known[element]) if element in known else None


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Convert between float formats: to nearest, ties to even; 8-bit floats saturate (``cvt.rn.satfinite``)."""
    before, after = _numpy_type(source), _numpy_type(target)
    assert before is not None, source
    assert after is not None, target
    values = np.ascontiguousarray(data).view(before).astype(np.float64)
    if after.itemsize == 1:
        most = 448.0 if after == ml_dtypes.float8_e4m3fn else 57344.0
        values = np.clip(values, -most, most)  # a NaN stays one
    if after.itemsize < 4:  # ml_dtypes rounds a float64 by way of float32; every source here fits that exactly
        values = values.astype(np.float32)
    with np.errstate(over="ignore"):
        converted = values.astype(after)
    return converted.view(f"uint{8 * after.itemsize}").reshape(data.shape)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Multiply blocks in the accumulator's type; exact for integers, float32 for floats."""
    from triton.runtime.interpreter import TensorHandle

    exact = d.data.dtype.kind == "i"  # float64 holds every sum of 8-bit products below 2**53, and is fast
    product = np.matmul(_widen(a, exact), _widen(b, exact)).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _widen(block: Any, exact: bool) -> Any:
    numpy_type = _numpy_type(block.dtype.scalar)
    data = block.data if numpy_type is None else block.data.view(numpy_type)
    return data.astype(np.float64 if exact else np.float32)

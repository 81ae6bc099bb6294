"""What a kernel's argument is: a torch tensor, a NumPy array, or a stand-in for one that does not exist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qcompiler.errors import TargetError

TRITON_TYPES: Mapping[str, str] = MappingProxyType(
    {
        "int8": "i8",
        "uint8": "u8",
        "int16": "i16",
        "int32": "i32",
        "int64": "i64",
        "float16": "fp16",
        "bfloat16": "bf16",
        "float32": "fp32",
        "float8e4m3fn": "fp8e4nv",
        "float8e5m2": "fp8e5",
        "bool": "i1",
    }
)
"""Triton's name of each dtype that a kernel may take."""

ITEMSIZE: Mapping[str, int] = MappingProxyType(
    dict.fromkeys(("int8", "uint8", "bool", "float8e4m3fn", "float8e5m2"), 1)
    | dict.fromkeys(("int16", "float16", "bfloat16"), 2)
    | dict.fromkeys(("int32", "float32"), 4)
    | {"int64": 8}
)
"""Bytes per element of each dtype."""


@dataclass(frozen=True)
class Operand:
    """A contiguous tensor's dtype and shape; stands for a tensor when one compiles ahead of time or counts bytes.

    Attributes:
        dtype: a key of ``ITEMSIZE``.
        shape: lengths of the axes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.size * ITEMSIZE[self.dtype]


def dtype_name(tensor: Any) -> str:
    """Return the name of the dtype of an `Operand`, a torch tensor or a NumPy array, as a key of ``ITEMSIZE``.

    Raises:
        TargetError: no kernel takes this dtype.
    """
    name = str(tensor.dtype).removeprefix("torch.").replace("float8_", "float8")
    if name not in ITEMSIZE:
        raise TargetError(f"no kernel takes dtype {name}; expected one of {', '.join(ITEMSIZE)}")
    return name


def describe(tensor: Any) -> Operand:
    """Return dtype and shape of a tensor (torch, NumPy or `Operand`)."""
    return tensor if isinstance(tensor, Operand) else Operand(dtype_name(tensor), tuple(int(n) for n in tensor.shape))


def strides(tensor: Any) -> tuple[int, ...]:
    """Return the strides of a tensor in elements; those of an `Operand` are contiguous."""
    if isinstance(tensor, Operand):
        return tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    if callable(getattr(tensor, "stride", None)):
        return tuple(int(n) for n in tensor.stride())
    return tuple(int(n) // tensor.dtype.itemsize for n in tensor.strides)

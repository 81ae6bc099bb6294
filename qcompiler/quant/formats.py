"""Storage formats and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class QuantFormat:
    """An integer storage format.

    Attributes:
        name: the name used in recipes, targets and dumps.
        bits: bits per element.
        signed: two's complement if true.
    """

    name: str
    bits: int
    signed: bool

    @property
    def qmin(self) -> int:
        """Return the smallest stored integer."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Return the largest stored integer."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def data_type(self) -> ir.DataType:
        """Return the ONNX element type."""
        return ir.DataType[self.name.upper()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the NumPy dtype that holds one element (ml_dtypes below 8 bits)."""
        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.name) if self.bits < 8 else self.name)
        return found


FORMATS: dict[str, QuantFormat] = {
    f.name: f
    for f in (
        QuantFormat(f"{'' if signed else 'u'}int{bits}", bits, signed)
        for bits in (2, 4, 8, 16)
        for signed in (True, False)
    )
} | {"int32": QuantFormat("int32", 32, True)}
"""Every integer format by name; int32 is for biases only."""


def format_of(dtype: ir.DataType | None) -> QuantFormat | None:
    """Return the format stored as an ONNX element type, or None."""
    return None if dtype is None else FORMATS.get(dtype.name.lower())

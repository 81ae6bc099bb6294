"""Storage formats and their ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

_FLOATS = {
    "float8e4m3fn": (8, 448, "float8_e4m3fn"),
    "float8e5m2": (8, 57344, "float8_e5m2"),
    "float4e2m1": (4, 6, "float4_e2m1fn"),
    "float8e8m0": (8, 0, "float8_e8m0fnu"),
}
"""Bits, largest finite number and ml_dtypes name (OCP 8-bit floating point and Microscaling formats, 2023)."""


@dataclass(frozen=True)
class QuantFormat:
    """A storage format.

    Attributes:
        name: ONNX's name of the element type in lower case; used in recipes, targets and dumps.
        bits: bits per element.
        signed: whether it stores negative numbers.
        kind: ``int``, or ``float`` where elements are small floats (then there is no zero point).
    """

    name: str
    bits: int
    signed: bool
    kind: Literal["int", "float"] = "int"

    @property
    def qmin(self) -> int:
        """Return the smallest stored number."""
        if self.kind == "float":
            return -self.qmax
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Return the largest stored finite number (448 for float8e4m3fn); 0 for float8e8m0, which holds scales only."""
        if self.kind == "float":
            return _FLOATS[self.name][1]
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def data_type(self) -> ir.DataType:
        """Return the ONNX element type."""
        return ir.DataType[self.name.upper()]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the NumPy dtype that holds one element (ml_dtypes below 8 bits, and for floats)."""
        if self.kind == "float":
            name = getattr(ml_dtypes, _FLOATS[self.name][2])
        else:
            name = getattr(ml_dtypes, self.name) if self.bits < 8 else self.name
        found: np.dtype[Any] = np.dtype(name)
        return found

    @property
    def scales_only(self) -> bool:
        """Return whether the format holds scales, not tensors."""
        return self.qmax == 0


FORMATS: dict[str, QuantFormat] = (
    {
        f.name: f
        for f in (
            QuantFormat(f"{'' if signed else 'u'}int{bits}", bits, signed)
            for bits in (2, 4, 8, 16)
            for signed in (True, False)
        )
    }
    | {"int32": QuantFormat("int32", 32, True)}
    | {name: QuantFormat(name, bits, name != "float8e8m0", "float") for name, (bits, _, _) in _FLOATS.items()}
)
"""Every format by name; int32 is for biases only, float8e8m0 for scales only."""


def format_of(dtype: ir.DataType | None) -> QuantFormat | None:
    """Return the integer format stored as an ONNX element type, or None."""
    found = None if dtype is None else FORMATS.get(dtype.name.lower())
    return found if found is not None and found.kind == "int" else None

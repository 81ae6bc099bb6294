"""The predicates of legality tables about single quantizations: stored types, scales, zero points, blocks, opsets.

A check is a frozen dataclass: its fields are the parameters that a row gives, its docstring says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import const_array, is_const, shape_of
from qcompiler.targets.quantized_view import (
    FLOATS,
    Quantized,
    QuantizedView,
    float_of,
    found_at_run_time,
    two_level,
    type_of,
)

Finding = tuple[ir.Node | None, str]
"""A node that breaks the rule (None for the model), and what was found against what is expected."""


def heads(view: QuantizedView, sides: tuple[str, ...] = ()) -> Iterator[Quantized]:
    """Yield what is judged once: all but the second half of a pair; only weights or activations if asked."""
    for q in view.quantized:
        if not q.behind and (not sides or ("weight" if q.constant else "activation") in sides):
            yield q


@dataclass(frozen=True)
class StoredTypes:
    """Refuse stored types; ``sides`` limits it to weights or activations, ``operators`` to quantize or dequantize."""

    refused: tuple[str, ...]
    sides: tuple[str, ...] = ()
    only: str = ""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations of a refused type that is said, not meant by default."""
        for q in heads(view, self.sides):
            if q.stored in self.refused and q.declared and self.only in ("", q.node.op_type):
                yield q.node, f"numbers are stored as {q.stored}"


@dataclass(frozen=True)
class StoredTypeMissing:
    """Refuse QuantizeLinear with neither a zero point nor ``output_dtype``, which ONNX reads as uint8."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for q in view.quantized:
            if q.quantizes and not q.declared:
                yield q.node, "there is neither a zero point nor output_dtype; expected one that says the stored type"


@dataclass(frozen=True)
class StoredTypeDiffers:
    """Refuse a zero point of another type than the stored numbers."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield dequantizations whose data and zero point differ in type."""
        for q in view.quantized:
            found = type_of(q.zero)
            if not q.quantizes and found and q.stored and found != q.stored:
                yield q.node, f"the zero point is {found}; expected {q.stored}, as the numbers are"


@dataclass(frozen=True)
class ZeroPointNonzero:
    """Refuse zero points other than 0, of weights or activations (``sides``), of the given stored types (or all)."""

    sides: tuple[str, ...] = ()
    stored: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations with such a zero point."""
        for q in heads(view, self.sides):
            array = const_array(q.zero)
            numbers = None if array is None else np.asarray(array, np.float64).reshape(-1)
            if self.stored and q.stored not in self.stored:
                continue
            if numbers is not None and (wrong := numbers[numbers != 0]).size:
                yield q.node, f"the zero point is {wrong[0]:g}; expected 0"


@dataclass(frozen=True)
class NotConstant:
    """Refuse scales (or zero points) that are computed in the graph."""

    what: str

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations with such an input."""
        for q in heads(view):
            value = q.scale if self.what == "scale" else q.zero
            if value is not None and not is_const(value) and not two_level(value):
                yield q.node, f"the {self.what} is computed in the graph or fed; expected a constant"


@dataclass(frozen=True)
class ParameterShapes:
    """Refuse scales that do not fit their axis, and zero points of another size than the scale."""

    what: str

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield what does not fit; unknown lengths fit."""
        for q in view.quantized:
            text = self._scale(q) if self.what == "scale" else self._zero(q)
            if text is not None:
                yield q.node, text

    @staticmethod
    def _zero(q: Quantized) -> str | None:
        sizes, expected = shape_of(q.zero), q.scale_shape
        if q.zero is None or sizes is None or expected is None or _known(sizes) == _known(expected):
            return None
        return f"the zero point has shape {list(sizes)}; expected that of the scale, {list(expected)}"

    @staticmethod
    def _scale(q: Quantized) -> str | None:
        if q.axis is None or q.shape is None or q.scale_shape is None:
            return None
        if not 0 <= q.axis < len(q.shape):
            return f"the axis is {q.axis}; expected one of {len(q.shape)} axes"
        if len(q.scale_shape) == 1 and not q.block:
            found, wanted = q.scale_shape[0], q.shape[q.axis]
            fits = found == wanted or not (isinstance(found, int) and isinstance(wanted, int))
            return None if fits else f"there are {found} scales; expected {wanted}, the length of axis {q.axis}"
        if len(q.scale_shape) != len(q.shape):
            return f"blocked scales have {len(q.scale_shape)} axes; expected {len(q.shape)}, as the data"
        for axis, (found, wanted) in enumerate(zip(q.scale_shape, q.shape, strict=True)):
            if axis != q.axis and isinstance(found, int) and isinstance(wanted, int) and found != wanted:
                return f"blocked scales have length {found} on axis {axis}; expected {wanted}: one axis has blocks"
        return None


def _known(shape: tuple[int | str | None, ...]) -> object:
    """Return a shape to compare: all shapes of one element are alike."""
    return () if all(d == 1 for d in shape) else shape


@dataclass(frozen=True)
class ScaleValues:
    """Refuse scales that are ``nonpositive`` or ``nonfinite``, except where numbers are stored as ``excepted``."""

    refused: str
    excepted: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations with such a scale."""
        for q in heads(view):
            if q.scales is None or q.stored in self.excepted:
                continue
            numbers = np.asarray(q.scales, np.float64).reshape(-1)
            wrong = numbers[numbers <= 0] if self.refused == "nonpositive" else numbers[~np.isfinite(numbers)]
            if wrong.size:
                yield q.node, f"a scale is {wrong[0]:g}; expected a positive finite number"


@dataclass(frozen=True)
class ScaleTypes:
    """Refuse element types of scales."""

    refused: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations with such scales."""
        for q in heads(view):
            if q.scale_type in self.refused:
                yield q.node, f"scales are {q.scale_type}; expected one of {', '.join(FLOATS)}"


@dataclass(frozen=True)
class ScaleMatchesData:
    """Refuse QuantizeLinear whose scale has another type than its input."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for q in view.quantized:
            found = float_of(q.node.inputs[0])
            if q.quantizes and found and q.scale_type in FLOATS and found != q.scale_type:
                yield q.node, f"the scale is {q.scale_type}; expected {found}, as the numbers to quantize"


@dataclass(frozen=True)
class Granularity:
    """Refuse scales per ``channel`` or per ``block`` on weights or activations, of the given stored types (or all)."""

    refused: str
    sides: tuple[str, ...]
    stored: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such quantizations."""
        for q in heads(view, self.sides):
            kind = "tensor" if q.axis is None else "block" if q.block else "channel"
            if found_at_run_time(q.node.inputs[0]):
                continue  # blocks are what that operator writes
            if kind == self.refused and (not self.stored or q.stored in self.stored):
                yield q.node, f"there is one scale per {kind}" + (f" of axis {q.axis}" if q.axis is not None else "")


@dataclass(frozen=True)
class BlockLength:
    """Refuse blocks that do not divide their axis (``rule = "divides"``), or of lengths not in ``lengths``."""

    rule: str
    lengths: tuple[int, ...] = ()
    stored: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such quantizations."""
        for q in heads(view):
            if not q.block or (self.stored and q.stored not in self.stored):
                continue
            if self.rule != "divides":
                if q.block not in self.lengths:
                    yield q.node, f"blocks have {q.block} elements; expected one of {', '.join(map(str, self.lengths))}"
                continue
            whole = q.shape[q.axis] if q.shape is not None and q.axis is not None and q.axis < len(q.shape) else None
            if isinstance(whole, int) and whole % q.block:
                yield q.node, f"blocks have {q.block} elements; expected a divisor of {whole}, the length of the axis"


@dataclass(frozen=True)
class BlockAxis:
    """Refuse blocks along another axis than the last two."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such quantizations."""
        for q in heads(view):
            if q.block and q.axis is not None and q.shape is not None and q.axis < len(q.shape) - 2:
                yield q.node, f"blocks lie along axis {q.axis} of {len(q.shape)}; expected the last or the one before"


@dataclass(frozen=True)
class OddLength:
    """Find weights of the given stored types whose last axis has an odd length."""

    stored: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield their dequantizations."""
        for q in heads(view, ("weight",)):
            last = q.shape[-1] if q.shape else None
            if q.stored in self.stored and isinstance(last, int) and last % 2:
                yield q.node, f"the last axis has length {last}; expected an even one"


@dataclass(frozen=True)
class OpsetRange:
    """Refuse models outside a range of operator sets."""

    least: int
    newest: int

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield the model if it is outside."""
        if not self.least <= view.opset <= self.newest:
            yield None, f"the model uses opset {view.opset}; expected {self.least} to {self.newest}"


@dataclass(frozen=True)
class OpsetAtLeast:
    """Refuse quantization that an older operator set does not have: by stored type, scale type, blocks, attribute."""

    least: int
    stored: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()
    per: str = ""
    attribute: str = ""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield quantizations of the ONNX domain that need a newer operator set."""
        if view.opset >= self.least:
            return
        for q in heads(view):
            if q.node.domain not in ("", "ai.onnx"):
                continue
            what = self._needs(q)
            if what:
                yield q.node, f"{what} in opset {view.opset}; expected opset {self.least} or newer"

    def _needs(self, q: Quantized) -> str:
        if q.stored in self.stored:
            return f"{q.stored} is used"
        if q.scale_type in self.scales:
            return f"{q.scale_type} scales are used"
        if self.per == "block" and q.block:
            return "blocks are used"
        if self.per == "channel" and q.axis is not None and not q.block:
            return "scales per channel are used"
        if self.attribute and self.attribute in q.node.attributes:
            return f"{self.attribute} is used"
        return ""

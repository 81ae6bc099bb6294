"""Chains of type conversions."""

from __future__ import annotations

import onnx_ir as ir

from qcompiler.patterns.builder import Builder
from qcompiler.patterns.clauses import where
from qcompiler.patterns.language import Rule, op, rule, var
from qcompiler.patterns.match import Match

_T = ir.DataType
_WIDER: dict[ir.DataType, tuple[ir.DataType, ...]] = {
    _T.BOOL: (
        _T.UINT8, _T.INT8, _T.UINT16, _T.INT16, _T.UINT32, _T.INT32, _T.UINT64, _T.INT64, _T.FLOAT16, _T.BFLOAT16,
        _T.FLOAT, _T.DOUBLE,
    ),
    _T.UINT8: (
        _T.UINT16, _T.INT16, _T.UINT32, _T.INT32, _T.UINT64, _T.INT64, _T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.DOUBLE,
    ),
    _T.INT8: (_T.INT16, _T.INT32, _T.INT64, _T.FLOAT16, _T.BFLOAT16, _T.FLOAT, _T.DOUBLE),
    _T.UINT16: (_T.UINT32, _T.INT32, _T.UINT64, _T.INT64, _T.FLOAT, _T.DOUBLE),
    _T.INT16: (_T.INT32, _T.INT64, _T.FLOAT, _T.DOUBLE),
    _T.UINT32: (_T.UINT64, _T.INT64, _T.DOUBLE),
    _T.INT32: (_T.INT64, _T.DOUBLE),
    _T.FLOAT16: (_T.FLOAT, _T.DOUBLE),
    _T.BFLOAT16: (_T.FLOAT, _T.DOUBLE),
    _T.FLOAT: (_T.DOUBLE,),
}  # fmt: skip


def is_lossless(source: ir.DataType, target: ir.DataType) -> bool:
    """Return whether every value of one element type is a value of the other."""
    return source == target or target in _WIDER.get(source, ())


def _inner_lossless(m: Match) -> str | None:
    source, middle = m.x.dtype, m.inner.dtype
    if source is None or middle is None:
        return "unknown-type: the types are not known"
    return None if is_lossless(source, middle) else f"lossy: {source} to {middle} does not keep every value"


def _cast_once(b: Builder, m: Match) -> ir.Value:
    return b.clone(m.root, m.x)


CASTS: tuple[Rule, ...] = (
    rule(
        "cast-of-widening-cast",
        match=op("Cast", op("Cast", var("x"), name="inner"), name="outer"),
        where=[where("inner keeps every value", _inner_lossless)],
        build=_cast_once,
        keeps=("inner",),
        doc="Convert once where the first of two conversions keeps every value.",
    ),
)
"""Rules of ``fold-casts``."""

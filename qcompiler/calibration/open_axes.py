"""Lengths for open axes, where feeds are invented."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from qcompiler.calibration.evidence import readers, table_size
from qcompiler.calibration.image_options import image_layout
from qcompiler.calibration.texts import POSITIONS, text_role
from qcompiler.engine import TensorInfo
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import attr_int, const_array, is_op

BATCH, SEQUENCE, SIDE, PAST, SIGNAL = 1, 64, 224, 16, 512
"""Lengths of a batch, a sequence, a picture's side, a cache of earlier steps, and a signal (one window of speech)."""

Dim = int | str | None


def check_inventable(info: TensorInfo) -> None:
    """Refuse an input that nothing can be invented for.

    Raises:
        CalibrationError: its rank is unknown, or its type is text.
    """
    if info.shape is None or info.dtype.kind == "O":
        raise CalibrationError(f"cannot make random data for input {info.name!r}: give --calibration SRC")


def open_lengths(values: Mapping[str | None, ir.Value], inputs: Sequence[TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Choose the shape of every input: what the model fixes, what its weights ask for, else what is usual.

    Axes of one name get one length. A name that adds others up (``past_sequence_length + 1``) gets their sum.

    Args:
        values: the graph's inputs by name.
        inputs: what a feed gives.

    Raises:
        CalibrationError: an input's rank is unknown, or it is text.
    """
    for info in inputs:
        check_inventable(info)
    lengths = _Lengths(_sequence(values, inputs), any("past" in d for i in inputs for d in _names(i)))
    for info in inputs:
        lengths.learn(info, values.get(info.name))
    return {info.name: lengths.shape(info, values.get(info.name)) for info in inputs}


def _names(info: TensorInfo) -> list[str]:
    return [d.lower() for d in info.shape or () if isinstance(d, str)]


def _sequence(values: Mapping[str | None, ir.Value], inputs: Sequence[TensorInfo]) -> int:
    """Return the length of sequences: no longer than the table that the positions look up."""
    tables = [
        table_size(values[i.name]) for i in inputs if text_role(i.name) == POSITIONS and values.get(i.name) is not None
    ]
    return min((SEQUENCE, *(size for size in tables if size is not None)))


class _Lengths:
    """Length by name of axis."""

    def __init__(self, sequence: int, cached: bool) -> None:
        self._sequence, self._cached = sequence, cached
        self._known: dict[str, int] = {}

    def learn(self, info: TensorInfo, value: ir.Value | None) -> None:
        """Note the lengths that weights ask of named axes."""
        for axis, length in _asked(info, value):
            dim = info.shape[axis] if info.shape is not None and axis < len(info.shape) else None
            if isinstance(dim, str):
                self._known.setdefault(dim, length)

    def shape(self, info: TensorInfo, value: ir.Value | None) -> tuple[int, ...]:
        """Return the shape of one input."""
        dims = info.shape or ()
        asked = dict(_asked(info, value))
        layout = image_layout(info) if info.dtype.kind in "fV" or info.dtype.itemsize == 1 else None
        return tuple(
            dim
            if isinstance(dim, int) and dim >= 0
            else asked[axis]
            if axis in asked
            else self._open(dim, axis, dims, layout)
            for axis, dim in enumerate(dims)
        )

    def _open(self, dim: Dim, axis: int, dims: Sequence[Dim], layout: str | None) -> int:
        name = dim if isinstance(dim, str) else None
        if name is not None and name in self._known:
            return self._known[name]
        length = self._named(name, axis, dims, layout)
        if name is not None:
            self._known[name] = length
        return length

    def _named(self, name: str | None, axis: int, dims: Sequence[Dim], layout: str | None) -> int:
        if name is not None and "+" in name:
            terms = [term.strip() for term in name.split("+")]
            return sum(int(t) if t.isdecimal() else self._open(t, 1, (None, t), None) for t in terms)
        text = (name or "").lower()
        if "batch" in text or (axis == 0 and (len(dims) > 1 or not _is_length(text))):
            return BATCH
        if "past" in text:
            return PAST
        if layout is not None:
            return {"N": BATCH, "C": 3, "H": SIDE, "W": SIDE}[layout[axis]]
        if "total" in text and self._cached:
            return PAST + self._sequence
        # A state that leads with its layers has its batch further in.
        unnamed_batch = not text and len(dims) > 2 and isinstance(dims[0], int)
        return BATCH if unnamed_batch else self._sequence


def _is_length(text: str) -> bool:
    return any(word in text for word in ("seq", "len", "time", "token"))


def _asked(info: TensorInfo, value: ir.Value | None) -> Iterator[tuple[int, int]]:
    """Yield (axis, length) that an input's weights ask for; an open last axis of floats that none reads is a signal."""
    found = dict(_weighed(value)) if value is not None else {}
    shape = info.shape or ()
    few = len(shape) == 2 or (len(shape) == 3 and isinstance(shape[1], int) and shape[1] <= 8)
    if few and info.dtype.kind in "fV" and text_role(info.name) is None and not isinstance(shape[-1], int):
        found.setdefault(len(shape) - 1, SIGNAL)
    yield from found.items()


def _weighed(value: ir.Value) -> Iterator[tuple[int, int]]:
    rank = len(value.shape) if value.shape is not None else 0
    for node, place in readers(value):
        if place != 0 or node.inputs[0] is not value or not is_op(node, "Conv", "Gemm", "MatMul"):
            continue
        weight = const_array(node.inputs[1])
        if weight is None or rank < 2:
            continue
        if is_op(node, "Conv"):
            yield 1, weight.shape[1] * attr_int(node, "group", 1)
        elif weight.ndim >= 2 and not attr_int(node, "transA", 0):
            yield rank - 1, weight.shape[-1 if attr_int(node, "transB", 0) else -2]

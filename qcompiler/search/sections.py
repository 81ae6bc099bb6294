"""Sections of an output that hold different quantities: a detector's boxes, objectness and class scores in one tensor.

The error of such an output is that of its largest section: boxes in pixels outweigh probabilities ten thousandfold, and
the output would pass for exact with every probability lost. Where the graph joins sections by a Concat, and float gives
them powers that differ by `APART` or more, each is judged as an output by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_int, attr_ints, is_op, shape_of

APART = 10.0
"""Ratio of mean squares from which on sections are judged apart: the weakest is 10 dB below what outweighs it."""
MOST_SECTIONS = 8
_ELEMENTWISE = ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Sigmoid", "Relu", "Clip", "Exp", "Tanh")
_REACH = 16

Partition = tuple[int, tuple[int, ...]]
"""(axis, ends of the sections along it)."""
_Axes = tuple[int | None, ...]


@dataclass(frozen=True)
class Section:
    """A slice of an output.

    Attributes:
        output: its name.
        axis: the axis that is sliced.
        start: first index.
        stop: one after the last index.
    """

    output: str
    axis: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Return the slice as NumPy writes it: ``output[:, :, 4:5]``."""
        return f"{self.output}[{':, ' * self.axis}{self.start}:{self.stop}]"

    def of(self, array: Array) -> Array:
        """Return the section's view of the output's array."""
        return array[(slice(None),) * self.axis + (slice(self.start, self.stop),)]


Sections = Mapping[str, Sequence[Section]]
"""By the name of the output; an output that is judged as a whole is not named."""


def cut(arrays: Mapping[str, Array], sections: Sections) -> dict[str, Array]:
    """Return results with every output that has sections replaced by them, each under its own name."""
    found: dict[str, Array] = {}
    for name, array in arrays.items():
        parts = sections.get(name, ())
        found.update({part.name: part.of(array) for part in parts} if parts else {name: array})
    return found


def places(outputs: Sequence[str], sections: Sections) -> tuple[str, ...]:
    """Return the names under which `cut` gives some outputs, in order."""
    return tuple(place for name in outputs for place in ([s.name for s in sections.get(name, ())] or [name]))


def find_sections(model: ir.Model, results: Sequence[Mapping[str, Array]]) -> dict[str, tuple[Section, ...]]:
    """Return the sections of the outputs that hold quantities of different scale.

    Args:
        model: the graph; lengths along the joined axis must be known.
        results: what float gives for some feeds; integers and sequences among them are passed over.
    """
    found: dict[str, tuple[Section, ...]] = {}
    for value in model.graph.outputs:
        name = str(value.name)
        arrays = [a for given in results if isinstance(a := given.get(name), np.ndarray) and a.dtype.kind == "f"]
        if not arrays or value.shape is None:
            continue
        best = APART
        for axis, ends in sorted(_partitions(value, tuple(range(len(value.shape))), _REACH)):
            parts = tuple(Section(name, axis, a, b) for a, b in pairwise((0, *ends)))
            if (ratio := _ratio(parts, arrays, ends[-1])) >= best:
                best, found[name] = ratio, parts
    return found


def _ratio(parts: Sequence[Section], arrays: Sequence[Array], length: int) -> float:
    """Return the largest mean square of a section over the least; 0 where sections do not fit or one is all zero."""
    axis = parts[0].axis
    if len(parts) > MOST_SECTIONS or any(a.ndim <= axis or a.shape[axis] != length or a.size == 0 for a in arrays):
        return 0.0
    powers = [_mean_square([part.of(a) for a in arrays]) for part in parts]
    return max(powers) / min(powers) if min(powers) > 0 else 0.0


def _mean_square(arrays: Sequence[Array]) -> float:
    total, count = 0.0, 0
    for array in arrays:
        finite = array[np.isfinite(array)].astype(np.float64)
        total, count = total + float(finite @ finite), count + finite.size
    return total / count if count else 0.0


def _partitions(value: ir.Value | None, axes: _Axes, reach: int) -> set[Partition]:
    """Return how Concats in front of a value part an output.

    Args:
        value: the value to look behind.
        axes: for each of its axes, that of the output that it became; None where it is no whole axis there.
        reach: how many operators to go back at most.
    """
    node = value.producer() if value is not None else None
    if node is None or value is None or reach == 0 or all(axis is None for axis in axes):
        return set()
    source = node.inputs[0] if node.inputs else None
    if is_op(node, *_ELEMENTWISE):
        return _partitions(source, axes, reach - 1)
    if is_op(node, "Transpose"):
        order = attr_ints(node, "perm") or tuple(reversed(range(len(axes))))
        before: list[int | None] = [None] * len(axes)
        for position, origin in enumerate(order):
            before[origin] = axes[position]
        return _partitions(source, tuple(before), reach - 1)
    if is_op(node, "Reshape", "Squeeze", "Unsqueeze", "Flatten"):
        kept = _kept_axes(source, value)
        return _partitions(source, tuple(None if k is None else axes[k] for k in kept), reach - 1) if kept else set()
    if is_op(node, "Concat"):
        return _joined(node, axes, reach)
    return set()


def _joined(node: ir.Node, axes: _Axes, reach: int) -> set[Partition]:
    """Return the partition that a Concat makes, and those that all its inputs have along other axes."""
    along = attr_int(node, "axis", 0) % len(axes)
    axis = axes[along]
    found = {p for p in set.intersection(*(_partitions(v, axes, reach - 1) for v in node.inputs)) if p[0] != axis}
    lengths = [(shape_of(v) or (None,) * len(axes))[along] for v in node.inputs]
    known = [n for n in lengths if isinstance(n, int)]
    if axis is not None and len(known) == len(lengths) > 1:
        found.add((axis, tuple(accumulate(known))))
    return found


def _kept_axes(source: ir.Value | None, result: ir.Value) -> list[int | None]:
    """Return, for each axis of what a Reshape reads, the same axis of its result, None where it is merged or split."""
    before, after = shape_of(source), shape_of(result)
    if before is None or after is None:
        return []
    kept: list[int | None] = [None] * len(before)
    for i, (a, b) in enumerate(zip(before, after, strict=False)):
        if not _same(a, b, first=i == 0):
            break
        kept[i] = i
    for i in range(1, min(len(before), len(after)) + 1):
        if kept[-i] is not None or not _same(before[-i], after[-i], first=False):
            break
        kept[-i] = len(after) - i
    return kept


def _same(a: int | str | None, b: int | str | None, *, first: bool) -> bool:
    """Return whether two lengths are one; an open first axis is taken for the batch, which stays apart."""
    return a == b if isinstance(a, int) and isinstance(b, int) else first or (a == b and a is not None)

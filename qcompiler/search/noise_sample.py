"""Few rows out of many feeds: what single points are measured on, as much as a bound on work allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array, Feeds, Runner
from qcompiler.errors import QCompilerError

MOST_ROWS = 64
"""Rows that single points are measured on at most."""
FAIR_SAMPLE = 1 << 13
"""Output elements after which more rows tell little more about one point."""
_SAME = 1e-3
"""Largest difference, relative to the largest magnitude, between a row alone and the same row among others."""


@dataclass(frozen=True)
class Sample:
    """Feeds cut down to a few rows.

    Attributes:
        feeds: the cut feeds.
        share: their work as a share of one evaluation of all feeds.
        rows: rows in all; a feed that cannot be cut is one.
    """

    feeds: tuple[Feeds, ...]
    share: float
    rows: int


def draw_sample(
    model: ir.Model, runner: Runner, outputs: Sequence[str], feeds: Sequence[Feeds], allowed: float
) -> Sample:
    """Choose rows, evenly spread over all feeds and within them.

    Rows are cut along a batch axis where the model declares one that is open, and its outputs were seen to depend on
    their own rows alone. Otherwise whole feeds are taken.

    Args:
        model: the float graph.
        runner: the same, loaded.
        outputs: the float outputs.
        feeds: what there is, at least one.
        allowed: most work, as a share of one evaluation of all feeds; one row is the least there is.
    """
    axes = batch_axes(model, feeds[0])
    batch = _length(feeds[0], axes)
    if batch > 1 and not _independent(runner, outputs, feeds[0], axes):
        axes, batch = {}, 1
    elements = _elements(runner, outputs, _cut(feeds[0], axes, 1)) if batch > 1 else None
    if elements is None:
        elements = _elements(runner, outputs, feeds[0])
    total = len(feeds) * batch
    wanted = min(MOST_ROWS, max(2, -(-FAIR_SAMPLE // max(elements, 1))))
    rows = max(1, min(total, wanted, int(allowed * total)))
    count = min(len(feeds), rows)
    chosen = [feeds[len(feeds) * i // count] for i in range(count)]
    per_feed = max(1, rows // count)
    cut = tuple(_cut(feed, axes, per_feed) for feed in chosen)
    rows = count * min(per_feed, batch)
    return Sample(cut, rows / total, rows)


def batch_axes(model: ir.Model, feed: Feeds) -> dict[str, int]:
    """Return, per input, the axis along which a feed can be cut; nothing if there is no open batch axis.

    It is the axis that the first input declares open in front, and whatever axis of others bears the same name, or
    lies in front and has no name, and has the same length.
    """
    found: dict[str, int] = {}
    symbol: str | None = None
    length = 0
    for value in model.graph.inputs:
        array = feed.get(str(value.name))
        if array is None or value.shape is None or array.ndim != len(value.shape):
            return {}
        dims = [d.value if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
        if not length:
            if not dims or isinstance(dims[0], int):
                return {}
            symbol, length = dims[0], int(array.shape[0])
        same = (i for i, d in enumerate(dims) if not isinstance(d, int) and (d == symbol if symbol else i == 0))
        axis = next(same, None)
        if axis is not None and array.shape[axis] == length:
            found[str(value.name)] = axis
    return found


def _length(feed: Feeds, axes: Mapping[str, int]) -> int:
    return min((int(feed[name].shape[axis]) for name, axis in axes.items()), default=1)


def _rows(length: int, count: int) -> npt.NDArray[np.int64]:
    return np.asarray([length * i // count for i in range(count)], np.int64)


def _cut(feed: Feeds, axes: Mapping[str, int], count: int) -> Feeds:
    length = _length(feed, axes)
    if not axes or count >= length:
        return feed
    rows = _rows(length, count)
    return {n: np.ascontiguousarray(np.take(a, rows, axes[n])) if n in axes else a for n, a in feed.items()}


def _elements(runner: Runner, outputs: Sequence[str], feed: Feeds) -> int:
    return sum(int(array.size) for array in runner.run(feed, list(outputs)).values())


def _independent(runner: Runner, outputs: Sequence[str], feed: Feeds, axes: Mapping[str, int]) -> bool:
    """Return whether two rows alone give what they give among the others."""
    length = _length(feed, axes)
    try:
        whole, part = runner.run(feed, list(outputs)), runner.run(_cut(feed, axes, 2), list(outputs))
    except QCompilerError:
        return False  # lengths are wired into the graph
    return all(_same_rows(whole[name], part[name], _rows(length, 2)) for name in outputs) if length > 2 else False


def _same_rows(whole: Array, part: Array, rows: npt.NDArray[np.int64]) -> bool:
    axes = [i for i, (a, b) in enumerate(zip(whole.shape, part.shape, strict=False)) if a != b]
    if whole.ndim != part.ndim or len(axes) != 1:
        return False
    a, b = np.take(whole, rows, axes[0]).astype(np.float64), part.astype(np.float64)
    if a.shape != b.shape:
        return False
    finite = np.isfinite(a)
    reach = float(np.abs(a[finite]).max(initial=0.0))
    return bool(np.array_equal(finite, np.isfinite(b)) and (np.abs(a - b)[finite] <= _SAME * reach).all())

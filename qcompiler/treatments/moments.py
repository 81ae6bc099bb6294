"""Measure E[x x'] of what each output of a product sums, a few layers at a time, and count what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.calibration.observe import PIECE_BYTES
from qcompiler.calibration.statistics import Statistics
from qcompiler.calibration.stepper import Stepper
from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.ir.graph import attr_int, attr_ints, const_array
from qcompiler.targets.groups import Group

MOST_FEEDS = 32
"""Feeds that rows are taken from at most."""
ROWS_PER_INPUT = 4
"""Rows per number that an output sums; with fewer H says less and less about other data."""
LEAST_ROWS = 2048
MOST_ROWS = 4096
"""More rows are not taken, however many numbers an output sums: the work grows with rows x K^2."""
MOMENT_BYTES = 256 << 20
"""Bytes of moments that are kept at a time; with more layers than fit the feeds are run again."""

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """How a product reads its input: 0 in ``groups`` for a matrix product, else as a convolution does."""

    groups: int = 0
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @staticmethod
    def of(root: ir.Node) -> Window:
        """Return the window of a Conv, Gemm or MatMul."""
        if root.op_type != "Conv":
            return Window()
        kernel = _weight_shape(root)[2:]
        ones = (1,) * len(kernel)
        return Window(
            attr_int(root, "group", 1), kernel, tuple(attr_ints(root, "strides") or ones),
            tuple(attr_ints(root, "dilations") or ones), tuple(attr_ints(root, "pads") or (0,) * 2 * len(kernel)),
        )  # fmt: skip


@dataclass
class Moments:
    """Sums of x x' of the products that read one value in the same way.

    Attributes:
        window: how they read it.
        groups: their groups.
        parts: independent matrices: the groups of a convolution.
        inputs: K, what one output sums.
        total: float32 [parts, K, K] once there was a row.
        rows: behind the total.
    """

    window: Window
    groups: list[Group]
    parts: int
    inputs: int
    total: Float | None = None
    rows: int = 0

    @property
    def nbytes(self) -> int:
        """Return what the total takes."""
        return 4 * self.parts * self.inputs**2

    def add(self, array: Array, most: int) -> None:
        """Add the rows of one value, or as many of them as wanted, evenly spread."""
        rows = _rows(self.window, array, most).astype(np.float32, copy=False)
        product = np.swapaxes(rows, -1, -2) @ rows
        if self.total is None:
            self.total = product
        else:
            self.total += product
        self.rows += rows.shape[1]

    def mean(self) -> Float | None:
        """Return E[x x'] [parts, K, K] and forget the total; None without finite numbers.

        Off the diagonal it is shrunk as far as so few rows say little about it: what K inputs have in common in fewer
        than K rows is mostly chance, and errors that cancel there do not on other data (the shrinkage of Ledoit and
        Wolf 2004 towards the diagonal, with a fixed rule for its share).
        """
        found, self.total = self.total, None
        if found is None or not np.isfinite(found).all():
            return None
        share = self.inputs / (self.inputs + self.rows)
        diagonal = np.einsum("gkk->gk", found).copy()
        found *= (1.0 - share) / self.rows
        np.einsum("gkk->gk", found)[...] = diagonal / self.rows
        return found


def rows_wanted(inputs: int) -> int:
    """Return how many rows the moments of K inputs are taken from."""
    return min(MOST_ROWS, max(LEAST_ROWS, ROWS_PER_INPUT * inputs))


def input_moments(
    model: ir.Model,
    groups: Iterable[Group],
    feeds: Iterable[Feeds],
    engine: Engine,
    *,
    expected: int = MOST_FEEDS,
    memory: int = MOMENT_BYTES,
) -> Iterator[tuple[Group, Float]]:
    """Yield each product with E[x x'] of what its outputs sum, float32 [groups of a Conv or 1, K, K].

    Products that read the same value in the same way share one array, which must not be changed. The layers in whose
    moments ``memory`` is full are yielded before the feeds are run for the next ones.

    Args:
        model: FLOAT graph; not changed.
        groups: Conv, Gemm and MatMul of its main graph.
        feeds: real data that can be read again, of which the first are used; of each some rows, evenly spread.
        engine: runs the model.
        expected: how many feeds there are, so that together they give as many rows as wanted.
        memory: bytes of moments kept at a time, at least those of one layer.
    """
    for together in _passes(_wanted(groups), memory):
        readers: dict[str, list[Moments]] = {}
        for moments in together:
            readers.setdefault(str(moments.groups[0].data[0].name), []).append(moments)
        _observe(model, readers, feeds, engine, max(1, min(expected, MOST_FEEDS)))
        for moments in together:
            mean = moments.mean()
            if mean is not None:
                yield from ((group, mean) for group in moments.groups)


def _observe(
    model: ir.Model, readers: Mapping[str, Sequence[Moments]], feeds: Iterable[Feeds], engine: Engine, expected: int
) -> None:
    def sink(name: str, array: Array) -> None:
        for moments in readers[name]:
            moments.add(array, -(-rows_wanted(moments.inputs) // expected))

    stepper = Stepper(model, frozenset(readers), engine, EngineOptions(1, False, True), PIECE_BYTES)
    for _, feed in zip(range(MOST_FEEDS), feeds, strict=False):
        stepper.run(feed, sink)


def _wanted(groups: Iterable[Group]) -> list[Moments]:
    """Return the moments to measure, one for all products that read a value in the same way."""
    found: dict[tuple[str, Window], Moments] = {}
    for group in groups:
        window = Window.of(group.root)
        key = (str(group.data[0].name), window)
        if key not in found:
            found[key] = Moments(window, [], max(1, window.groups), inputs_of(group.root))
        found[key].groups.append(group)
    return list(found.values())


def _passes(wanted: Sequence[Moments], memory: int) -> Iterator[list[Moments]]:
    """Yield runs of moments that fit the memory together."""
    together: list[Moments] = []
    for moments in wanted:
        if together and sum(m.nbytes for m in together) + moments.nbytes > memory:
            yield together
            together = []
        together.append(moments)
    if together:
        yield together


# ---- rows -----------------------------------------------------------------------------------------------------------


def _rows(window: Window, array: Array, most: int) -> Array:
    """Return the rows that outputs sum, [parts, rows, K]."""
    if not window.groups:
        flat = array.reshape(-1, array.shape[-1])
        return flat[_spread_evenly(len(flat), most)][None]
    patches = _patches(window, array, most)
    return np.swapaxes(patches.reshape(len(patches), window.groups, -1), 0, 1)


def _spread_evenly(count: int, most: int) -> Int:
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).astype(np.int64))


def _patches(window: Window, array: Array, most: int) -> Array:
    """Return what a Conv reads at some of its outputs: [positions, channels, *kernel]."""
    rank, pads = len(window.kernel), window.pads
    if any(pads):
        array = np.pad(array, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(array, reach, axis=tuple(range(2, 2 + rank)))
    taps = (slice(None), slice(None), *(slice(None, None, s) for s in window.strides))
    windows = windows[(*taps, *(slice(None, None, d) for d in window.dilations))]
    # [batch, channels, *positions, *kernel]: take positions before anything is copied.
    places = [windows.shape[0], *windows.shape[2 : 2 + rank]]
    chosen = np.unravel_index(_spread_evenly(math.prod(places), most), places)
    places_of: tuple[Any, ...] = (chosen[0], slice(None), *chosen[1:])
    return np.asarray(windows[places_of])


# ---- work -----------------------------------------------------------------------------------------------------------


def inputs_of(root: ir.Node) -> int:
    """Return how many products an output of a Conv, Gemm or MatMul with a constant weight sums."""
    shape = _weight_shape(root)
    return math.prod(shape[1:]) if root.op_type == "Conv" else shape[0]


def rounding_work(group: Group) -> int:
    """Return the multiply-adds that it takes to round a weight of K x N: of moments, factor, rounding and check."""
    inputs, parts = inputs_of(group.root), max(1, Window.of(group.root).groups)
    columns = math.prod(_weight_shape(group.root)) // inputs
    return parts * inputs**2 * (rows_wanted(inputs) + inputs // 3) + 3 * inputs**2 * columns


def product_work(group: Group, statistics: Statistics) -> int:
    """Return the multiply-adds of a product in all feeds that were observed; 0 where nothing is known of its size."""
    result, data = str(group.root.outputs[0].name), str(group.data[0].name)
    if statistics.observed(result):
        return statistics.elements_per_feed(result) * inputs_of(group.root) * statistics.feeds
    if not statistics.observed(data):
        return 0
    shape, window = _weight_shape(group.root), Window.of(group.root)
    each = shape[0] * math.prod(window.kernel) // math.prod(window.strides) if window.groups else shape[1]
    return statistics.elements_per_feed(data) * each // max(1, window.groups) * statistics.feeds


def _weight_shape(root: ir.Node) -> tuple[int, ...]:
    weight = const_array(root.inputs[1])
    assert weight is not None
    return weight.shape

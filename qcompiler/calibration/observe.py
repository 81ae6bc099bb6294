"""Observation: run the FLOAT graph and reduce each wanted value as soon as it exists."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.statistics import Parts, Statistics, TensorStatistics, part_name
from qcompiler.calibration.stepper import Stepper
from qcompiler.engine import Array, Engine, EngineOptions, Feeds
from qcompiler.errors import CalibrationError
from qcompiler.ir.graph import all_graphs

Progress = Callable[[int, int | None], None]

PIECE_BYTES = 32 << 20
"""Looked-at values that one piece of the graph holds at a time, unless the memory cap is lower: more gains no speed."""
_MOST_CHANNELS = 1 << 16
_SPATIAL = frozenset({"Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization"})


def default_memory() -> int:
    """Return a quarter of the free memory in bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


@dataclass
class Observer:
    """What it takes to observe one graph; usable by many threads at once.

    Attributes:
        model: canonical FLOAT graph; not changed.
        names: value names in any graph, bodies of If, Loop and Scan included.
        engine: runs the model.
        threads: threads inside one operator.
        memory: bytes that observed values may take at a time; default a quarter of what is free.
        squares: names whose sum of squares per channel is wanted as well.
        parts: names that are wanted per channel or block as well, each part with a sketch of its own.
    """

    model: ir.Model
    names: Sequence[str]
    engine: Engine
    threads: int = 1
    memory: int | None = None
    squares: Collection[str] = ()
    parts: Mapping[str, Parts] = field(default_factory=dict)
    _axes: Mapping[str, int] = field(init=False, repr=False)
    _stepper: Stepper = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._axes = channel_axes(self.model, set(self.names))
        limit = min(self.memory or default_memory(), PIECE_BYTES)
        options = EngineOptions(threads=self.threads, optimize=False, shared_pool=True)
        self._stepper = Stepper(self.model, frozenset(self.names), self.engine, options, limit)

    def observe(self, feed: Feeds, index: int, into: Statistics) -> None:
        """Run one feed and add what it gives.

        Args:
            feed: input name to array.
            index: the feed's number over the whole run.
            into: statistics of one thread's shard; changed in place.

        Raises:
            CalibrationError: a value holds NaN or the engine stops; names the sample, and the tensor that holds NaN.
        """

        def sink(name: str, array: Array) -> None:
            tensor = into.sketch(name)
            tensor.add(array, index, self._axes.get(name), squares=name in self.squares)
            if tensor.nans:
                raise CalibrationError(_nan_text(name, index, feed))
            if name in self.parts:
                _add_parts(into, name, array, index, self.parts[name])

        try:
            self._stepper.run(feed, sink)
        except CalibrationError as error:
            if str(error).startswith("sample "):
                raise
            raise CalibrationError(f"sample {index}: {error}") from error
        into.feeds += 1

    @property
    def pieces(self) -> int:
        """Return into how many pieces the main graph is cut, 0 before the first feed."""
        return self._stepper.segments


def _add_parts(into: Statistics, name: str, array: Array, index: int, parts: Parts) -> None:
    if not -array.ndim <= parts.axis < array.ndim:
        raise CalibrationError(f"{name} has {array.ndim} axes; there is no axis {parts.axis} to cut")
    for number, start in enumerate(range(0, array.shape[parts.axis], parts.block)):
        taken = np.take(array, range(start, min(start + parts.block, array.shape[parts.axis])), parts.axis)
        into.sketch(part_name(name, number)).add(taken, index)


def observe(
    model: ir.Model,
    names: Sequence[str],
    feeds: Iterable[Feeds],
    engine: Engine,
    *,
    threads: int = 1,
    memory: int | None = None,
    progress: Progress | None = None,
    squares: Collection[str] = (),
) -> Statistics:
    """Run all feeds in this thread and gather statistics of the named float values.

    Engine optimizations are off, since with them a tensor's value depends on which others are observed. Infinities that
    the model computes are counted and left out: the masks of attention are infinite on purpose.

    Args:
        model: canonical FLOAT graph; not changed.
        names: value names, in any graph.
        feeds: read once.
        engine: runs the model.
        threads: threads inside one operator.
        memory: bytes that observed values may take at a time; default a quarter of what is free.
        progress: called with feeds done and, where known, their number.
        squares: names whose sum of squares per channel is wanted as well.

    Raises:
        CalibrationError: there is no feed, or a tensor holds NaN (names the sample and the tensor).
    """
    observer = Observer(model, names, engine, threads, memory, squares)
    statistics = blank(names)
    for index, feed in enumerate(feeds):
        observer.observe(feed, index, statistics)
        if progress is not None:
            progress(index + 1, length_of(feeds))
    if not statistics.feeds:
        raise CalibrationError("the calibration source is empty; give at least one feed")
    return statistics


def blank(names: Iterable[str]) -> Statistics:
    """Return statistics in which nothing was seen yet, in the order of the names."""
    return Statistics({name: TensorStatistics() for name in names})


def length_of(feeds: Iterable[Feeds]) -> int | None:
    """Return the number of feeds where it is known without reading them."""
    try:
        return len(feeds)  # type: ignore[arg-type]  # a source that does not know raises TypeError
    except TypeError:
        return None


def _nan_text(name: str, index: int, feed: Feeds) -> str:
    given = [a for a in map(np.asarray, feed.values()) if a.dtype.kind in "fV"]
    if not all(np.isfinite(a.astype(np.float32)).all() for a in given):
        return f"sample {index}: tensor {name!r} holds NaN, and so do the inputs or infinity: mend them"
    return (
        f"sample {index}: tensor {name!r} holds NaN although the inputs are finite; the float model itself "
        "computes it: look at the operators in front of that tensor"
    )


def channel_axes(model: ir.Model, names: Collection[str]) -> Mapping[str, int]:
    """Return the channel axis of each named value that has one of fixed length.

    It is axis 1 of what a convolution or normalization by channel reads or writes and of everything of rank 4 and more,
    else the last axis.
    """
    found: dict[str, int] = {}
    for graph in all_graphs(model):
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            if value.name not in names or value.shape is None or len(value.shape) < 2:
                continue
            axis = 1 if len(value.shape) > 3 or _by_convolution(value) else len(value.shape) - 1
            length = value.shape[axis]
            if isinstance(length, int) and 1 < length <= _MOST_CHANNELS:
                found[str(value.name)] = axis
    return found


def _by_convolution(value: ir.Value) -> bool:
    producer = value.producer()
    readers = [node for node, index in value.uses() if index == 0]
    return len(value.shape or ()) > 2 and any(
        node.op_type in _SPATIAL for node in (*readers, *([producer] if producer is not None else ()))
    )

"""Streaming statistics of activations: sketches of fixed size by value name, and how they are merged.

A merge is associative and commutative bit for bit (`tensor_statistics`), however the feeds were shared out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.channel_extremes import ChannelExtremes
from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.tensor_statistics import HALF_BINS, TensorStatistics
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec

__all__ = ["HALF_BINS", "ChannelExtremes", "Parts", "Statistics", "TensorStatistics", "merge_all", "part_name"]


@dataclass
class Statistics:
    """Statistics by value name; a `qcompiler.quant.spec.RangeSource`.

    Attributes:
        tensors: what was observed.
        feeds: number of feeds.
        about: where the statistics come from: digests of graph and data, engine, threads (`qcal.Key` as a mapping).
        synthetic: how the feeds were made where there was no data; empty for real data.
    """

    tensors: dict[str, TensorStatistics] = field(default_factory=dict)
    feeds: int = 0
    about: dict[str, str] = field(default_factory=dict)
    synthetic: str = ""
    _ranges: dict[tuple[str, str, QuantSpec | None], tuple[float, float]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def sketch(self, name: str) -> TensorStatistics:
        """Return what is kept of a value, to add to; made at the first call."""
        if name not in self.tensors:
            self.tensors[name] = TensorStatistics()
        return self.tensors[name]

    def observed(self, name: str) -> bool:
        """Return whether calibration ever executed the value with at least one element."""
        return name in self.tensors and self.tensors[name].count > 0

    def range(self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None) -> tuple[float, float]:
        """Return (low, high) of a value by an estimator.

        Args:
            name: the value.
            estimator: as `estimate` reads it, such as ``percentile:99.99``.
            spec: what the range is quantized to; unsigned 8 bits by default.

        Raises:
            CalibrationError: the value was never observed, or the estimator is unknown.
        """
        if not self.observed(name):
            raise CalibrationError(f"{name} was never executed during calibration")
        key = (name, estimator, spec)
        if key not in self._ranges:
            self._ranges[key] = estimate(self.tensors[name], estimator, spec)
        return self._ranges[key]

    def ranges(
        self, name: str, estimator: str = "min-max", spec: QuantSpec | None = None
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return (low, high) per channel or block of a value that was observed in parts.

        Args:
            name: the value.
            estimator: as for `range`.
            spec: as for `range`.

        Returns:
            float64 [parts] each.

        Raises:
            CalibrationError: the value was not observed in parts.
        """
        if part_name(name, 0) not in self.tensors:
            raise CalibrationError(f"{name} was not observed per channel or block; ask for it when calibrating")
        found: list[tuple[float, float]] = []
        while (part := part_name(name, len(found))) in self.tensors:
            found.append(self.range(part, estimator, spec))
        both = np.array(found, np.float64)
        return both[:, 0], both[:, 1]

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a value."""
        return self.tensors[name].mean_square

    def elements_per_feed(self, name: str) -> int:
        """Return the average number of elements that one feed gives the value."""
        tensor = self.tensors[name]
        return tensor.count // max(1, tensor.executions)

    def take_in(self, other: Statistics) -> None:
        """Merge another shard of one run into this one, the same bit for bit in any order.

        Sketches are merged in place and one by one, so that this takes no further memory. Whoever interrupts it is left
        with statistics of which some parts are merged and some are not.

        Args:
            other: used up: it is empty afterwards, each sketch being freed as soon as it is merged.
        """
        self._ranges.clear()
        for name in tuple(other.tensors):
            self.sketch(name).take_in(other.tensors.pop(name))
        self.feeds += other.feeds
        self.about = self.about | other.about

    def merge(self, other: Statistics) -> Statistics:
        """Return the statistics of both shards of one run and leave them alone; otherwise as `take_in`."""
        made = self.copy()
        made.take_in(other.copy())
        return made

    def copy(self) -> Statistics:
        """Return statistics that can be changed without touching these."""
        tensors = {name: tensor.copy() for name, tensor in self.tensors.items()}
        return Statistics(tensors, self.feeds, dict(self.about), self.synthetic)

    def movement(self, share: float = 0.1) -> dict[str, float]:
        """Return by how much each range grew over the last feeds, relative to its final width.

        Zero says that the extremes were known before; a large number that more feeds would widen the range further.

        Args:
            share: which share of the feeds counts as last.
        """
        found: dict[str, float] = {}
        last = max(1, round(self.feeds * share))
        for name, tensor in self.tensors.items():
            recent = tensor.recent
            if not recent.feeds.size or tensor.maximum <= tensor.minimum:
                continue
            before = recent.values[recent.feeds < self.feeds - last]
            low = min(recent.earlier[0], float(before[:, 0].min(initial=np.inf)))
            high = max(recent.earlier[1], float(before[:, 1].max(initial=-np.inf)))
            grown = 1.0 if high < low else 1.0 - (high - low) / (tensor.maximum - tensor.minimum)
            found[name] = grown
        return found


def part_name(name: str, index: int) -> str:
    """Return the name under which one channel or block of a value is kept."""
    return f"{name}#{index}"


@dataclass(frozen=True)
class Parts:
    """How a value is cut into parts with a sketch of their own.

    Attributes:
        axis: the axis that is cut.
        block: indices of that axis in one part; 1 is per channel.
    """

    axis: int
    block: int = 1


def merge_all(shards: Iterable[Statistics]) -> Statistics:
    """Return the statistics of all shards of one run, which are left alone."""
    merged = Statistics()
    for shard in shards:
        merged.take_in(shard.copy())
    return merged

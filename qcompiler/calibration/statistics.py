"""Streaming statistics of activations: fixed size, mergeable, and independent of the order of feeds.

Histogram bins have power-of-two widths anchored at zero, so merging two histograms of different widths is exact:
the finer one is folded pairwise until the widths agree. Counts are integers. Sums are kept per feed.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.estimators import estimate
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

HALF_BINS = 1024
"""Bins on each side of zero; a histogram has twice as many."""
_VERSION = 1
_BLOCK = 1 << 15
"""Elements taken in at a time: the temporary arrays stay in the second-level cache."""


@dataclass
class TensorStatistics:
    """What is kept of one tensor.

    Attributes:
        count: elements seen.
        minimum: smallest value.
        maximum: largest value.
        zeros: elements equal to zero.
        exponent: bins are 2**exponent wide.
        counts: int64 [2 * HALF_BINS]; bin i covers [(i - HALF_BINS) * width, (i + 1 - HALF_BINS) * width).
        sums: (sum of x, sum of x squared, elements, minimum, maximum) per feed, in feed order, float64.
        feeds: index of the feed of each entry of ``sums``; shards of one run number their feeds over the whole run.
    """

    count: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    zeros: int = 0
    exponent: int = -126
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(2 * HALF_BINS, np.int64))
    sums: list[tuple[float, float, int, float, float]] = field(default_factory=list)
    feeds: list[int] = field(default_factory=list)

    @property
    def width(self) -> float:
        """Return the width of a bin."""
        return float(2.0**self.exponent)

    @property
    def mean_square(self) -> float:
        """Return E[x^2]."""
        return math.fsum(s[1] for s in self.sums) / self.count if self.count else 0.0

    def add(self, values: Array, feed: int | None = None) -> None:
        """Take in one feed's tensor (any float type and shape, finite); ``feed`` is its index, by default the next."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if flat.size == 0:
            return
        low, high = float(flat.min()), float(flat.max())
        self._widen(max(-low, high))
        total = square = 0.0
        nonzero = 0
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            self._count(block, low)
            nonzero += int(np.count_nonzero(block))
            wide = block.astype(np.float64)
            total += float(wide.sum())
            square += float(np.einsum("i,i->", wide, wide))
        self.count += flat.size
        self.zeros += flat.size - nonzero
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.sums.append((total, square, flat.size, low, high))
        self.feeds.append(feed if feed is not None else self.feeds[-1] + 1 if self.feeds else 0)

    def _count(self, block: npt.NDArray[np.float32], low: float) -> None:
        """Add one block to the histogram, whose reach covers it; ``low`` is no larger than its smallest value.

        Scaling by a power of two is exact but for one case: a negative number may become a zero, and fall on the wrong
        side of it. Those are counted and put back, so that a wider histogram equals a finer one folded.
        """
        scaled = block * np.float32(2.0**-self.exponent)
        np.floor(scaled, out=scaled)
        index = scaled.astype(np.int64)
        index += HALF_BINS
        added = np.bincount(index, minlength=2 * HALF_BINS)
        if low < 0:
            lost = int(np.count_nonzero(block < 0)) - int(added[:HALF_BINS].sum())
            added[HALF_BINS] -= lost
            added[HALF_BINS - 1] += lost
        self.counts += added

    def _widen(self, reach: float) -> None:
        """Double the bin width until ``reach`` lies inside, folding neighbours together."""
        if reach <= 0:
            return
        wanted = int(np.ceil(np.log2(reach / HALF_BINS)))
        if 2.0**wanted * HALF_BINS <= reach:
            wanted += 1
        self._fold_to(max(wanted, self.exponent, -120))

    def _fold_to(self, exponent: int) -> None:
        if self.count == 0:
            self.exponent = exponent
        while self.exponent < exponent:
            folded = np.zeros_like(self.counts)
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            start = HALF_BINS - HALF_BINS // 2
            folded[start : start + HALF_BINS] = pairs
            self.counts = folded
            self.exponent += 1

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """Return the statistics of both, the same bit for bit whichever way shards are merged.

        What is kept per feed is brought into the order of the feeds' indices.
        """
        mine, theirs = self.copy(), other.copy()
        if not mine.count:
            return theirs
        if not theirs.count:
            return mine
        exponent = max(mine.exponent, theirs.exponent)
        mine._fold_to(exponent)
        theirs._fold_to(exponent)
        mine.counts = mine.counts + theirs.counts
        mine.count += theirs.count
        mine.zeros += theirs.zeros
        mine.minimum = min(mine.minimum, theirs.minimum)
        mine.maximum = max(mine.maximum, theirs.maximum)
        order = sorted(zip(mine.feeds + theirs.feeds, mine.sums + theirs.sums, strict=True))
        mine.feeds, mine.sums = [feed for feed, _ in order], [sums for _, sums in order]
        return mine

    def copy(self) -> TensorStatistics:
        """Return statistics that can be changed without touching these."""
        return TensorStatistics(
            self.count, self.minimum, self.maximum, self.zeros, self.exponent, self.counts.copy(), list(self.sums),
            list(self.feeds),
        )  # fmt: skip


@dataclass
class Statistics:
    """Statistics by value name; a `qcompiler.quant.spec.RangeSource`.

    Attributes:
        tensors: what was observed.
        feeds: number of feeds.
    """

    tensors: dict[str, TensorStatistics] = field(default_factory=dict)
    feeds: int = 0
    _ranges: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def observed(self, name: str) -> bool:
        """Return whether calibration ever executed the value with at least one element."""
        return name in self.tensors and self.tensors[name].count > 0

    def range(self, name: str, estimator: str = "min-max") -> tuple[float, float]:
        """Return (low, high) of a value by an estimator.

        Raises:
            CalibrationError: the value was never observed, or the estimator is unknown.
        """
        if not self.observed(name):
            raise CalibrationError(f"{name} was never executed during calibration")
        key = (name, estimator)
        if key not in self._ranges:
            self._ranges[key] = estimate(self.tensors[name], estimator)
        return self._ranges[key]

    def mean_square(self, name: str) -> float:
        """Return E[x^2] of a value."""
        return self.tensors[name].mean_square

    def elements_per_feed(self, name: str) -> int:
        """Return the average number of elements in one execution of the value."""
        tensor = self.tensors[name]
        return tensor.count // max(1, len(tensor.sums))

    def save(self, path: str | Path) -> None:
        """Write to one .npz file (no pickle)."""
        head: dict[str, Any] = {"version": _VERSION, "feeds": self.feeds, "tensors": {}}
        arrays: dict[str, Any] = {}
        for index, (name, tensor) in enumerate(self.tensors.items()):
            head["tensors"][name] = {
                "index": index, "count": tensor.count, "minimum": tensor.minimum, "maximum": tensor.maximum,
                "zeros": tensor.zeros, "exponent": tensor.exponent, "sums": tensor.sums, "feeds": tensor.feeds,
            }  # fmt: skip
            arrays[f"counts.{index}"] = tensor.counts
        text = np.frombuffer(json.dumps(head).encode(), np.uint8)
        with Path(path).open("wb") as file:
            np.savez_compressed(file, head=text, **arrays)

    @staticmethod
    def load(path: str | Path) -> Statistics:
        """Read what `save` wrote.

        Raises:
            CalibrationError: not such a file, or of another version.
        """
        try:
            # Opened here, since np.load leaves the file open where it is no archive.
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                head: Mapping[str, Any] = json.loads(data["head"].tobytes())
                if head["version"] != _VERSION:
                    raise CalibrationError(f"{path}: statistics of version {head['version']}; expected {_VERSION}")
                tensors = {n: _restored(t, data[f"counts.{t['index']}"]) for n, t in head["tensors"].items()}
        except (OSError, KeyError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise CalibrationError(f"{path} is not a statistics file: {error}") from error
        return Statistics(tensors, head["feeds"])


def _restored(fields: Mapping[str, Any], counts: npt.NDArray[np.int64]) -> TensorStatistics:
    sums = [(a, b, count, low, high) for a, b, count, low, high in fields["sums"]]
    return TensorStatistics(
        fields["count"], fields["minimum"], fields["maximum"], fields["zeros"], fields["exponent"], counts, sums,
        list(fields["feeds"]),
    )  # fmt: skip

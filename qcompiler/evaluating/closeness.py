"""How close the outputs of a compiled model are to float: per output with an interval, and sample by sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array, Feeds
from qcompiler.evaluating.intervals import Doubles, Interval, of_ratio, of_share
from qcompiler.evaluating.pair import Results
from qcompiler.search.quality import CEILING

_BFLOAT16 = ir.DataType.BFLOAT16.numpy()
_TINY = 1e-300
MOST_SHOWN = 10
"""Worst samples that are told."""


@dataclass(frozen=True)
class Place:
    """One sample: a feed, or one row of a feed's leading axis."""

    feed: int
    row: int | None = None

    def __str__(self) -> str:
        return f"feed {self.feed}" + ("" if self.row is None else f" row {self.row}")


@dataclass(frozen=True)
class OutputFigure:
    """How close one output is.

    Attributes:
        name: of the output.
        sqnr_db: 10 log10(signal power / error power) over all samples; None of an output that is not floating.
        sqnr_interval: of it; None of fewer than two samples, or of an error without bound.
        cosine: cosine of the angle between all values of the two.
        agreement: share of rows with the same arg-max; None where the output is no score over classes.
        agreement_interval: of it.
        rows: rows behind the agreement.
        same_samples: samples of which all rows agree.
        differing: share of different elements; None of a floating output.
    """

    name: str
    sqnr_db: float | None
    sqnr_interval: Interval | None = None
    cosine: float | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None
    rows: int = 0
    same_samples: int = 0
    differing: float | None = None


@dataclass(frozen=True)
class WorstSample:
    """One of the samples that are farthest from float.

    Attributes:
        index: number of the sample over all feeds, from 0.
        place: which feed and row it is.
        output: the output that is worst there.
        sqnr_db: SQNR of that output there.
        text: what differs, for people.
    """

    index: int
    place: Place
    output: str
    sqnr_db: float
    text: str


@dataclass(frozen=True)
class Closeness:
    """Closeness of all outputs.

    Attributes:
        outputs: one figure per output.
        samples: number of samples.
        unit: what a sample is: ``row`` of the leading axis, or ``feed``.
        worst: the worst samples, the worst first.
        changed: samples of another arg-max than float, the first of them.
        sample_db: SQNR per sample at its worst output, float64 [samples].
    """

    outputs: tuple[OutputFigure, ...]
    samples: int
    unit: str
    worst: tuple[WorstSample, ...]
    changed: tuple[WorstSample, ...] = ()
    sample_db: Doubles = field(repr=False, compare=False, default_factory=lambda: np.zeros(0))

    @property
    def least_db(self) -> float:
        """Return the least SQNR over the outputs."""
        return min((f.sqnr_db for f in self.outputs if f.sqnr_db is not None), default=CEILING)


@dataclass
class _Columns:
    """What is summed up of one output, one entry per sample: signal, error, compiled power, product, rows, same."""

    sums: list[Doubles] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    elements: int = 0
    different: int = 0
    floating: bool = True


def rows_of(feed: Feeds, *results: Results) -> int | None:
    """Return the length of the leading axis that all inputs and outputs of a feed have, None if they have none.

    Inputs without any axis (a sampling rate, a step) are left out of account.
    """
    arrays = [a for a in feed.values() if a.ndim]
    for found in results:
        if not all(isinstance(a, np.ndarray) and a.ndim for a in found.values()):
            return None
        arrays += list(found.values())
    lengths = {a.shape[0] for a in arrays}
    return lengths.pop() if len(lengths) == 1 and 0 not in lengths else None


def compare(
    runs: Iterable[tuple[Feeds, Results, Results]], outputs: Sequence[str], class_like: Sequence[str]
) -> Closeness:
    """Compare the outputs of both models.

    Samples are the rows of the leading axis if every array of every feed has the same, else the feeds.

    Args:
        runs: feed, float outputs, compiled outputs.
        outputs: names of what is compared.
        class_like: outputs that are scores over the classes of their last axis.
    """
    both: tuple[_Tallies, _Tallies] = (_Tallies(outputs, class_like, True), _Tallies(outputs, class_like, False))
    by_rows = True
    for number, (feed, wanted, found) in enumerate(runs):
        rows = rows_of(feed, {n: wanted[n] for n in outputs}, {n: found[n] for n in outputs})
        by_rows = by_rows and rows is not None
        if by_rows:
            both[0].add(number, wanted, found, rows or 1)
        both[1].add(number, wanted, found, 1)
    tallies = both[0] if by_rows else both[1]
    # A row of a batch of one is the feed itself.
    alone = all(p.row == 0 for p in tallies.places) and len({p.feed for p in tallies.places}) == len(tallies.places)
    return tallies.result("feed" if alone or not by_rows else "row")


class _Tallies:
    """Sums per sample of all outputs."""

    def __init__(self, outputs: Sequence[str], class_like: Sequence[str], by_rows: bool) -> None:
        self.columns = {name: _Columns() for name in outputs}
        self.class_like, self.by_rows = frozenset(class_like), by_rows
        self.places: list[Place] = []

    def add(self, number: int, wanted: Results, found: Results, rows: int) -> None:
        start = len(self.places)
        self.places += [Place(number, r if self.by_rows else None) for r in range(rows)]
        for name, columns in self.columns.items():
            a, b = wanted[name], found[name]
            if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
                self._add(columns, start, a, b, rows, name in self.class_like)

    def _add(self, columns: _Columns, start: int, a: Array, b: Array, rows: int, classes: bool) -> None:
        columns.floating = a.dtype.kind == "f" or a.dtype == _BFLOAT16
        sums = np.zeros((rows, 6))
        if a.shape != b.shape:  # a number of boxes or tokens that differs: nothing of it agrees
            sums[:, 1] = np.inf if columns.floating else 0.0
            columns.elements, columns.different = columns.elements + a.size, columns.different + a.size
            columns.texts[start] = f"shape {list(a.shape)} of float, {list(b.shape)} of the compiled"
        elif not columns.floating:
            unlike = np.asarray(a != b).reshape(rows, -1)
            columns.elements, columns.different = columns.elements + a.size, columns.different + int(unlike.sum())
            for row in np.flatnonzero(unlike.any(-1)):
                columns.texts[start + int(row)] = f"{int(unlike[row].sum())} of {unlike.shape[1]} elements differ"
            sums[:, 0], sums[:, 1] = unlike.shape[1], unlike.sum(-1)
        else:
            x, y = (v.astype(np.float64).reshape(rows, -1) for v in (a, b))
            _powers(sums, x, y)
            known = classes and a.ndim >= 2 and a.shape[-1] > 1
            if known:
                tops = [v.reshape(rows, -1, a.shape[-1]).argmax(-1) for v in (x, y)]
                same = tops[0] == tops[1]
                sums[:, 4], sums[:, 5] = same.shape[1], same.sum(-1)
                for row in np.flatnonzero(~same.all(-1)):
                    if len(columns.changed) < MOST_SHOWN:
                        columns.changed[start + int(row)] = _classes(tops[0][row], tops[1][row])
            for row in np.argsort(_ratios(sums))[::-1][:MOST_SHOWN]:
                shape = a.shape[1:] if self.by_rows else a.shape
                text = _classes(tops[0][row], tops[1][row]) if known else ""
                columns.texts[start + int(row)] = text or _element(x[row], y[row], shape)
        columns.sums.append(sums)

    def result(self, unit: str) -> Closeness:
        arrays = {n: np.concatenate(c.sums) for n, c in self.columns.items() if c.sums}
        figures = tuple(_figure(n, self.columns[n], sums) for n, sums in arrays.items())
        ratios = {n: _ratios(sums) for n, sums in arrays.items() if self.columns[n].floating}
        ratios = ratios or {n: _ratios(sums) for n, sums in arrays.items()}
        names = list(ratios)
        table = np.stack([ratios[n] for n in names]) if names else np.zeros((0, len(self.places)))
        worst = table.max(0) if names else np.zeros(len(self.places))
        chosen = [int(i) for i in np.argsort(-worst, kind="stable")[:MOST_SHOWN] if worst[i] > 0]
        samples = []
        for index in chosen:
            name = names[int(table[:, index].argmax())]
            samples.append(self._sample(index, name, float(worst[index]), self.columns[name].texts, unit))
        changed = [
            self._sample(index, name, float(ratios[name][index]), columns.changed, unit)
            for name, columns in self.columns.items()
            for index in columns.changed
        ]
        return Closeness(figures, len(self.places), unit, tuple(samples), tuple(changed), _decibels(worst))

    def _sample(self, index: int, name: str, ratio: float, texts: Mapping[int, str], unit: str) -> WorstSample:
        place = self.places[index] if unit == "row" else Place(self.places[index].feed)
        return WorstSample(index, place, name, float(_decibels(ratio)), texts.get(index, ""))


def _powers(sums: Doubles, x: Doubles, y: Doubles) -> None:
    """Write signal, error, compiled power and product per row; an error without bound is infinite."""
    fine = np.isfinite(x)
    broken = (~np.isfinite(y) & fine).any(-1)
    x, y = np.where(fine, x, 0.0), np.where(fine & np.isfinite(y), y, 0.0)
    sums[:, 0] = np.square(x).sum(-1)
    sums[:, 1] = np.where(broken, np.inf, np.square(x - y).sum(-1))
    sums[:, 2], sums[:, 3] = np.square(y).sum(-1), (x * y).sum(-1)


def _ratios(sums: Doubles) -> Doubles:
    return np.asarray(sums[:, 1] / np.maximum(sums[:, 0], _TINY))


def _decibels(ratio: Doubles | float) -> Doubles:
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(-10.0 * np.log10(np.asarray(ratio, np.float64)), -CEILING, CEILING))


def _sqnr(sums: Doubles) -> Doubles:
    return _decibels(sums[:, 1] / np.maximum(sums[:, 0], _TINY))


def _share(sums: Doubles) -> Doubles:
    return np.asarray(sums[:, 5] / np.maximum(sums[:, 4], 1.0))


def _figure(name: str, columns: _Columns, sums: Doubles) -> OutputFigure:
    total = sums.sum(0)
    if not columns.floating:
        return OutputFigure(name, None, differing=columns.different / max(columns.elements, 1))
    sqnr = float(_sqnr(total[None])[0])
    norm = float(np.sqrt(total[0]) * np.sqrt(total[2]))
    cosine = float(np.clip(total[3] / norm, -1.0, 1.0)) if norm > 0 and np.isfinite(total[1]) else None
    rows, same = int(total[4]), int(np.sum((sums[:, 4] == sums[:, 5]) & (sums[:, 4] > 0)))
    if not rows:
        return OutputFigure(name, sqnr, of_ratio(sums[:, :2], _sqnr), cosine)
    single = rows == sums.shape[0]
    # Rows of one sample (the places of a text) go together: only where each sample is one row is the exact one right.
    interval = of_share(same, rows) if single else of_ratio(sums[:, 4:6], lambda t: t[:, 1] / np.maximum(t[:, 0], 1))
    share = float(_share(total[None])[0])
    return OutputFigure(name, sqnr, of_ratio(sums[:, :2], _sqnr), cosine, share, interval, rows, same)


def _classes(wanted: Array, found: Array) -> str:
    """Say which arg-max differs; empty if none does."""
    unlike = np.flatnonzero(wanted != found)
    if not unlike.size:
        return ""
    first = int(unlike[0])
    text = f"class {int(wanted[first])} of float, {int(found[first])} of the compiled"
    return text if wanted.size == 1 else f"{unlike.size} of {wanted.size} arg-max differ; at {first}: {text}"


def _element(x: Doubles, y: Doubles, shape: Sequence[int]) -> str:
    """Say where the largest error is."""
    if not x.size:
        return ""
    with np.errstate(invalid="ignore"):
        error = np.abs(x - y)
    place = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
    index = [int(i) for i in np.unravel_index(place, tuple(shape) or (1,))] if len(shape) else []
    return f"largest error at {index}: {x[place]:.5g} of float, {y[place]:.5g} of the compiled"

"""A user's metric of both models, with a paired interval of the difference.

Evaluation data is the same for both, so the difference is far better known than either figure. A metric takes all feeds
at once and may pair them with labels by their order, so samples cannot simply be drawn anew. Instead one sample at a
time of the float outputs is replaced by the compiled one: what that changes is the sample's part of the difference, and
for a metric that is a mean over samples the parts add up to it exactly. The parts are then resampled. Where they do not
add up, and the order of the feeds is of no account, feeds are resampled and the metric is called again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.engine import Array, Feeds
from qcompiler.errors import BudgetError
from qcompiler.evaluating.closeness import Place, rows_of
from qcompiler.evaluating.intervals import (
    FEW,
    Doubles,
    Interval,
    bootstrap_indices,
    exact_mcnemar,
    of_paired_shares,
    of_sum,
    percentiles,
)
from qcompiler.evaluating.pair import Results
from qcompiler.search.quality import Metric

MOST_CALLS = 1000
"""Calls of the metric at most, and the fewest worth making."""
_LEAST_CALLS = 100
_SECONDS = 20.0
"""About how long the metric may be called."""
_ADDS_UP = 0.01
"""Share of the difference, or of the parts' spread, that may be missing from the sum of the parts."""
_WHOLE = 1e-6
"""Distance from a whole number of samples that arithmetic may make."""


@dataclass(frozen=True)
class TaskFigure:
    """A metric of both models.

    Attributes:
        reference: of the float model.
        compiled: of the compiled model.
        interval: of compiled - reference; None if there is only one sample.
        samples: samples behind the interval.
        unit: what a sample is: ``rows``, ``feeds`` or ``blocks of rows``.
        better: samples that only the compiled model is right on; None where samples are not right or wrong.
        worse: samples that only the float model is right on.
        p_value: of McNemar's exact test; None where samples are not right or wrong.
        calls: how often the metric was called.
        note: what limits the interval.
    """

    reference: float
    compiled: float
    interval: Interval | None
    samples: int
    unit: str
    better: int | None = None
    worse: int | None = None
    p_value: float | None = None
    calls: int = 0
    note: str = ""

    @property
    def difference(self) -> float:
        """Return compiled - reference: below 0 the compiled model is worse."""
        return self.compiled - self.reference


class _Caller:
    """Calls the metric, and counts."""

    def __init__(self, metric: Metric, feeds: Sequence[Feeds]) -> None:
        self.metric, self.feeds = metric, list(feeds)
        self.calls, self.seconds = 0, 0.0

    def __call__(self, outputs: Sequence[Results], feeds: Sequence[Feeds] | None = None) -> float:
        start = time.perf_counter()
        value = float(self.metric(outputs, self.feeds if feeds is None else feeds))
        self.seconds += time.perf_counter() - start
        self.calls += 1
        return value

    def affordable(self) -> int:
        """Return how many more calls there may be."""
        each = self.seconds / max(self.calls, 1)
        return int(np.clip(_SECONDS / max(each, 1e-9), _LEAST_CALLS, MOST_CALLS))


def measure_task(
    metric: Metric, feeds: Sequence[Feeds], wanted: Sequence[Results], found: Sequence[Results], seed: int = 0
) -> TaskFigure:
    """Return a metric of both models, and how well the difference is known.

    Args:
        metric: maps outputs and feeds to a number, more is better.
        feeds: the evaluation feeds.
        wanted: outputs of the float model.
        found: outputs of the compiled model.
        seed: of the draws.

    Raises:
        BudgetError: the metric fails.
    """
    call = _Caller(metric, feeds)
    reference, compiled = call(wanted), call(found)
    places, unit = _samples(feeds, wanted, found)
    if len(places) < 2:
        note = "one sample only: how far the difference would be another on other data is unknown"
        return TaskFigure(reference, compiled, None, len(places), unit, calls=call.calls, note=note)
    blocks = _blocks(places, call.affordable())
    unit = unit if len(blocks) == len(places) else f"blocks of {unit}"
    parts, problem = _parts(call, blocks, reference, wanted, found)
    if parts is not None and _adds_up(parts, compiled - reference):
        return _of_parts(parts, len(places), reference, compiled, unit, call.calls, seed)
    if len(feeds) > 1 and _order_free(call, feeds, wanted, found, (reference, compiled), seed):
        drawn = _resampled(call, feeds, wanted, found, seed)
        return TaskFigure(reference, compiled, drawn, len(feeds), "feeds", calls=call.calls)
    note = problem or "the metric is no mean over samples, so the interval is a first-order estimate"
    interval: Interval | None = None
    if parts is not None:
        # What the parts leave out is spread evenly: the interval lies around the measured difference.
        parts = parts + (compiled - reference - parts.sum()) / parts.size
        interval = of_sum(parts, seed, unit)
    return TaskFigure(reference, compiled, interval, len(blocks), unit, calls=call.calls, note=note)


def _samples(feeds: Sequence[Feeds], wanted: Sequence[Results], found: Sequence[Results]) -> tuple[list[Place], str]:
    """Return the samples: rows where all arrays of all feeds have the same leading axis, else feeds."""
    rows = [rows_of(f, a, b) for f, a, b in zip(feeds, wanted, found, strict=True)]
    if all(r is not None for r in rows) and any(r != 1 for r in rows):
        return [Place(i, r) for i, count in enumerate(rows) for r in range(count or 0)], "rows"
    return [Place(i) for i in range(len(feeds))], "feeds"


def _blocks(places: Sequence[Place], most: int) -> list[list[Place]]:
    """Return at most ``most`` blocks of consecutive samples."""
    size = -(-len(places) // most)
    return [list(places[i : i + size]) for i in range(0, len(places), size)]


def _parts(
    call: _Caller, blocks: Sequence[Sequence[Place]], reference: float, wanted: Sequence[Results],
    found: Sequence[Results],
) -> tuple[Doubles | None, str]:  # fmt: skip
    """Return what each block changes if it alone comes from the compiled model."""
    parts = np.zeros(len(blocks))
    for number, block in enumerate(blocks):
        if _same(block, wanted, found):
            continue
        mixed = list(wanted)
        for place in block:
            mixed[place.feed] = _swapped(mixed[place.feed], found[place.feed], place.row)
        try:
            parts[number] = call(mixed) - reference
        except BudgetError as error:
            return None, f"no interval: with outputs of both models mixed, {error}"
    return parts, ""


def _same(block: Sequence[Place], wanted: Sequence[Results], found: Sequence[Results]) -> bool:
    """Return whether all outputs of a block are equal bit for bit, so that no metric can tell."""
    for place in block:
        for name, array in wanted[place.feed].items():
            other = found[place.feed].get(name)
            if not isinstance(array, np.ndarray) or not isinstance(other, np.ndarray):
                return False
            a, b = (array, other) if place.row is None else (array[place.row], other[place.row])
            if a.shape != b.shape or not np.array_equal(a, b):
                return False
    return True


def _swapped(base: Results, other: Results, row: int | None) -> dict[str, Array]:
    if row is None:
        return dict(other)
    made = {}
    for name, array in base.items():
        made[name] = array.copy()
        made[name][row] = other[name][row]
    return made


def _adds_up(parts: Doubles, difference: float) -> bool:
    spread = float(np.sqrt(np.square(parts).sum()))
    return bool(abs(parts.sum() - difference) <= _ADDS_UP * max(abs(difference), spread) + 1e-12)


def _of_parts(
    parts: Doubles, samples: int, reference: float, compiled: float, unit: str, calls: int, seed: int
) -> TaskFigure:
    """Return the figure of a metric that is a mean over samples."""
    better = worse = p_value = None
    interval = of_sum(parts, seed, unit)
    scale = _right_or_wrong(parts * samples) if parts.size == samples else None
    if scale is not None:
        better, worse = int((parts > 0).sum()), int((parts < 0).sum())
        p_value = exact_mcnemar(better, worse)
        if better + worse < FEW:
            plain = of_paired_shares(better, worse, samples)
            interval = Interval(scale * plain.low, scale * plain.high, plain.method)
    elif not parts.any():
        note = "no sample changes the metric, so nothing is known of how far other data would"
        return TaskFigure(reference, compiled, interval, parts.size, unit, calls=calls, note=note)
    return TaskFigure(reference, compiled, interval, parts.size, unit, better, worse, p_value, calls)


def _right_or_wrong(counts: Doubles) -> float | None:
    """Return what a sample counts (1, or 100 of a percentage) if each is right or wrong, else None."""
    moved = np.abs(counts[counts != 0])
    for scale in (1.0, 100.0):
        if moved.size and np.all(np.abs(moved - scale) <= _WHOLE * scale * counts.size):
            return scale
    return None


def _order_free(
    call: _Caller, feeds: Sequence[Feeds], wanted: Sequence[Results], found: Sequence[Results],
    figures: tuple[float, float], seed: int,
) -> bool:  # fmt: skip
    """Return whether the metric is the same for feeds in any order: if not, it pairs them with labels of its own."""
    generator = np.random.default_rng(seed)
    orders = [np.arange(len(feeds))[::-1], *(generator.permutation(len(feeds)) for _ in range(3))]
    for order in orders:
        for outputs, figure in zip((wanted, found), figures, strict=True):
            try:
                value = call([outputs[i] for i in order], [feeds[i] for i in order])
            except BudgetError:
                return False
            if abs(value - figure) > 1e-9 * max(abs(figure), 1e-9):
                return False
    # One feed fewer: a metric with labels of its own fails, or compares with those of other samples.
    try:
        call(list(wanted[1:]), list(feeds[1:]))
    except BudgetError:
        return False
    return True


def _resampled(
    call: _Caller, feeds: Sequence[Feeds], wanted: Sequence[Results], found: Sequence[Results], seed: int
) -> Interval:
    """Return the interval of a metric that is called again on resampled feeds, both models on the same."""
    count = max(_LEAST_CALLS, call.affordable() // 2)
    made = []
    for drawn in bootstrap_indices(len(feeds), count, seed):
        chosen = [feeds[i] for i in drawn]
        made.append(call([found[i] for i in drawn], chosen) - call([wanted[i] for i in drawn], chosen))
    return percentiles(np.asarray(made), f"paired bootstrap over {len(feeds)} feeds, {count} times measured again")

"""Extremes feed by feed, of the latest feeds, in arrays that are taken before they are needed."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

RECENT = 1024
"""Feeds whose extremes are kept one by one, for the moving average and for how ranges moved."""
_SHARD = 16
"""Feeds that a shard's statistics have room for; what takes in another's, or more feeds, gets room for `RECENT`."""


class RecentExtremes:
    """Extremes of the latest `RECENT` feeds, one by one, and of all earlier feeds together.

    Attributes:
        earlier: (low, high) of all feeds before those that are kept one by one.
    """

    __slots__ = ("_count", "_feeds", "_values", "earlier")

    def __init__(
        self,
        feeds: npt.NDArray[np.int64] | None = None,
        values: npt.NDArray[np.float32] | None = None,
        earlier: tuple[float, float] = (math.inf, -math.inf),
    ) -> None:
        """Take over what `feeds`, `values` and `earlier` of others are: int64 [k], ascending, and float32 [k, 2]."""
        self._feeds = np.zeros(0, np.int64) if feeds is None else feeds
        self._values = np.zeros((0, 2), np.float32) if values is None else values
        self._count = self._feeds.size
        self.earlier = earlier

    def __repr__(self) -> str:
        return f"RecentExtremes({self.feeds!r}, {self.values!r}, {self.earlier!r})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecentExtremes):
            return NotImplemented
        return (
            self.earlier == other.earlier
            and np.array_equal(self.feeds, other.feeds)
            and np.array_equal(self.values, other.values)
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def feeds(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the feeds kept one by one, int64 [k], ascending; a view."""
        return self._feeds[: self._count]

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """Return low and high of those feeds, float32 [k, 2]; a view."""
        return self._values[: self._count]

    @property
    def latest(self) -> int:
        """Return the number of the latest feed, -1 if there is none."""
        return int(self._feeds[self._count - 1]) if self._count else -1

    def note(self, feed: int, low: float, high: float) -> bool:
        """Take in the extremes of one execution; return whether its feed is another than the latest."""
        count = self._count
        if count and feed == self._feeds[count - 1]:  # once more in the same feed: a loop's body
            last = self._values[count - 1]
            last[0], last[1] = min(last[0], low), max(last[1], high)
        elif count and feed < self._feeds[count - 1]:
            self._insert(np.array([feed]), np.array([[low, high]], np.float32))
            return True
        else:
            self._append(feed, low, high)
            return True
        return False

    def take_in(self, other: RecentExtremes) -> None:
        """Take in the extremes of another, which is left alone; a feed that is in both gets the wider ones."""
        if not other._count:
            return
        self._make_room(RECENT)
        low, high = (f(a, b) for f, a, b in zip((min, max), self.earlier, other.earlier, strict=True))
        self.earlier = low, high
        if int(other._feeds[0]) > self.latest:
            for feed, (low, high) in zip(other.feeds.tolist(), other.values.tolist(), strict=True):
                self._append(feed, low, high)
        else:
            self._insert(other.feeds, other.values)

    def copy(self) -> RecentExtremes:
        """Return extremes that can be changed without touching these."""
        return RecentExtremes(self.feeds.copy(), self.values.copy(), self.earlier)

    def _append(self, feed: int, low: float, high: float) -> None:
        """Take in a feed later than all others."""
        if self._count >= RECENT:
            self._drop(self._count + 1 - RECENT)
        if self._count == self._feeds.size:
            self._make_room(RECENT if self._count >= _SHARD else min(_SHARD, RECENT))
        self._feeds[self._count] = feed
        self._values[self._count] = low, high
        self._count += 1

    def _insert(self, feeds: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> None:
        """Take in feeds of which some are earlier than some of these."""
        merged, where = np.unique(np.concatenate([self.feeds, feeds]), return_inverse=True)
        both = np.concatenate([self.values, values])
        wider = np.empty((merged.size, 2), np.float32)
        wider[:, 0], wider[:, 1] = np.inf, -np.inf
        np.minimum.at(wider[:, 0], where, both[:, 0])
        np.maximum.at(wider[:, 1], where, both[:, 1])
        if merged.size > RECENT:
            self._fold(wider[:-RECENT])
            merged, wider = merged[-RECENT:], wider[-RECENT:]
        self._make_room(merged.size)
        self._count = merged.size
        self._feeds[: self._count], self._values[: self._count] = merged, wider

    def _drop(self, count: int) -> None:
        """Put the earliest feeds together with those before them."""
        self._fold(self._values[:count])
        kept = self._count - count
        self._feeds[:kept], self._values[:kept] = self._feeds[count : self._count], self._values[count : self._count]
        self._count = kept

    def _fold(self, early: npt.NDArray[np.float32]) -> None:
        low, high = self.earlier
        self.earlier = min(low, float(early[:, 0].min())), max(high, float(early[:, 1].max()))

    def _make_room(self, size: int) -> None:
        """Move to arrays of this size if they are smaller; filled, so that the system hands their memory out now."""
        if self._feeds.size >= size:
            return
        feeds, values = np.full(size, -1, np.int64), np.full((size, 2), np.nan, np.float32)
        feeds[: self._count], values[: self._count] = self.feeds, self.values
        self._feeds, self._values = feeds, values

"""Real requests as calibration data: copies, as many as asked for, no more bytes than allowed."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qcompiler.engine import Array, Feeds


def copied(feed: Mapping[str, Any]) -> dict[str, Array] | None:
    """Return copies of a request's arrays, since callers reuse buffers; None if it cannot calibrate.

    Args:
        feed: arrays, lists or ``OrtValue`` by input name. Sparse tensors, sequences and maps, and numbers that are not
            finite, cannot calibrate.
    """
    made: dict[str, Array] = {}
    for name, value in feed.items():
        if hasattr(value, "is_tensor") and not value.is_tensor():
            return None
        try:
            array = np.array(value.numpy() if hasattr(value, "data_ptr") and hasattr(value, "numpy") else value)
        except Exception:  # types that NumPy has no equal of; the request itself is not our business
            return None
        if array.dtype.kind in "fc" and not np.isfinite(array).all():
            return None
        if array.dtype.kind == "O" and not all(isinstance(item, str | bytes) for item in array.flat):
            return None
        made[name] = array
    return made


class Samples:
    """A bounded list of requests, filled by many threads."""

    def __init__(self, requests: int, most_bytes: int) -> None:
        """Make an empty one.

        Args:
            requests: how many are wanted.
            most_bytes: bytes after which no more are taken, even if fewer were seen.
        """
        self._wanted, self._room = requests, most_bytes
        self._feeds: list[Feeds] = []
        self._taken = 0
        self._lock = threading.Lock()
        self._closed = False

    def __len__(self) -> int:
        """Return how many requests were taken, also after they were handed over."""
        return self._taken

    def add(self, feed: Feeds) -> bool:
        """Take one request; return True to exactly one caller: the one whose request made the list complete."""
        size = sum(array.nbytes for array in feed.values())
        with self._lock:
            if self._closed:
                return False
            if size <= self._room:
                self._room -= size
                self._taken += 1
                self._feeds.append(feed)
            elif not self._feeds:
                return False  # a smaller one may follow
            else:
                self._room = 0
            self._closed = len(self._feeds) >= self._wanted or self._room == 0
            return self._closed

    def close(self) -> list[Feeds]:
        """Take no more, and hand the requests over: the list here is empty afterwards."""
        with self._lock:
            self._closed = True
            feeds, self._feeds = self._feeds, []
            return feeds

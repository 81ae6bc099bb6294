"""Digests of feeds, by which an interrupted run knows its feeds again: eight bytes for each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array, Feeds

_ROOM = 4096
"""Feeds that there is room for from the start."""


class FeedDigests(Mapping[int, str]):
    """The digest of each feed done, 16 hexadecimal digits, by its number over the whole run; in ascending order."""

    def __init__(self, given: Mapping[int, str] | None = None) -> None:
        """Make one of another mapping's digests.

        Raises:
            ValueError: a digest is no hexadecimal number or a feed's number is negative.
        """
        self._numbers: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._known: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._count = 0
        self._make_room(_ROOM)
        for index, digest in (given or {}).items():
            self.note(index, digest)

    def __getitem__(self, index: int) -> str:
        if not (0 <= index < self._known.size and self._known[index]):
            raise KeyError(index)
        return f"{int(self._numbers[index]):016x}"

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < self._known.size and bool(self._known[index])

    def __iter__(self) -> Iterator[int]:
        return (index for index in range(self._known.size) if self._known[index])

    def __len__(self) -> int:
        return self._count

    def note(self, index: int, digest: str) -> None:
        """Note the digest of one feed.

        Raises:
            ValueError: it is no hexadecimal number or the feed's number is negative.
        """
        if index < 0:
            raise ValueError(f"feeds are numbered from 0, found {index}")
        if index >= self._known.size:
            self._make_room(max(index + 1, 2 * self._known.size))
        self._numbers[index] = int(digest, 16)
        self._count += not self._known[index]
        self._known[index] = True

    @property
    def together(self) -> str:
        """Return one digest of all feeds in their order, 32 hexadecimal digits."""
        made = hashlib.blake2b(digest_size=16)
        for index, digest in self.items():
            made.update(f"{index}:{digest};".encode())
        return made.hexdigest()

    def _make_room(self, size: int) -> None:
        numbers, known = np.full(size, ~np.uint64(0)), np.full(size, False)
        numbers[: self._numbers.size], known[: self._known.size] = self._numbers, self._known
        self._numbers, self._known = numbers, known


def feed_digest(feed: Feeds) -> str:
    """Return 16 hex digits that differ where names, types, shapes or numbers of a feed differ."""
    made = hashlib.blake2b(digest_size=8)
    for name in sorted(feed):
        array: Array = np.asarray(feed[name])
        made.update(f"{name}:{array.dtype}:{array.shape};".encode())
        made.update(_bytes(array))
    return made.hexdigest()


def _bytes(array: Array) -> Any:
    if array.dtype.kind == "O":
        return repr(array.tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

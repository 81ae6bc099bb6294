"""Where every buffer lies in one block of memory: greedy by size, the largest first, each as low as it fits.

Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference (2020), section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

ALIGNMENT = 256
"""Bytes; what CUDA's own allocator aligns to."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer: its size, and the first and last step in which it must hold its contents."""

    name: str
    nbytes: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Return whether two buffers are needed at the same time."""
        return self.first <= other.last and other.first <= self.last


def aligned(nbytes: int) -> int:
    """Return a size rounded up to the alignment, and at least one unit of it."""
    return max(-(-nbytes // ALIGNMENT), 1) * ALIGNMENT


def assign_offsets(buffers: Iterable[Lifetime]) -> tuple[dict[str, int], int]:
    """Return the offset of each buffer, and the size of the arena."""
    placed: list[tuple[int, Lifetime]] = []
    offsets: dict[str, int] = {}
    for buffer in sorted(buffers, key=lambda b: (-b.nbytes, b.first, b.name)):
        start = 0
        for offset, other in sorted((p for p in placed if buffer.meets(p[1])), key=lambda p: p[0]):
            if start + aligned(buffer.nbytes) <= offset:
                break
            start = max(start, offset + aligned(other.nbytes))
        placed.append((start, buffer))
        offsets[buffer.name] = start
    return offsets, max((offset + aligned(b.nbytes) for offset, b in placed), default=0)


def peak_bytes(buffers: Sequence[Lifetime]) -> int:
    """Return the most bytes that are needed at one time: no arena can be smaller."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.first] = changes.get(buffer.first, 0) + aligned(buffer.nbytes)
        changes[buffer.last + 1] = changes.get(buffer.last + 1, 0) - aligned(buffer.nbytes)
    most = live = 0
    for step in sorted(changes):
        live += changes[step]
        most = max(most, live)
    return most


def find_lifetimes(
    sizes: Mapping[str, int], writes: Sequence[Sequence[str]], reads: Sequence[Sequence[str]], kept: Iterable[str]
) -> list[Lifetime]:
    """Return the lifetimes of buffers.

    Args:
        sizes: bytes of each buffer that is to lie in the arena.
        writes: buffers written by each step.
        reads: buffers read by each step.
        kept: buffers that must hold their contents to the end.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, (written, read) in enumerate(zip(writes, reads, strict=True)):
        for name in (*written, *read):
            first.setdefault(name, index)
            last[name] = index
    for name in kept:
        last[name] = len(writes)
    return [Lifetime(n, size, first[n], last[n]) for n, size in sizes.items() if n in first]

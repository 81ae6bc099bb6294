"""Exact sums of floating-point numbers: the result does not depend on the order of additions.

A sum is a fixed-point number wide enough for every term, kept as limbs of 32 bits in int64, so that additions are
integer additions (Kulisch's long accumulator; Kulisch and Miranker, SIAM Review 28, 1986).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_BITS = 32
_MASK = (1 << _BITS) - 1
_LOWEST = -352
"""Exponent of the lowest bit: below any sum of squares of float32 numbers (2^-298), less the 53 bits of a double."""
LIMBS = 22
"""Reach up to 2^(22 * 32 - 352) = 2^352, above any such sum (2^256 times the number of terms)."""
_CARRY_AFTER = 1 << 28
"""Terms after which limbs are brought into their one form: each adds less than 2^32 to a limb."""
_FEW = 4
"""Sums up to which adding one by one is faster than by arrays."""


@dataclass
class ExactSums:
    """Exact sums of float64 terms, one for each of ``size`` places.

    Attributes:
        size: number of sums.
        limbs: int64 [size, LIMBS], lowest limb first.
    """

    size: int
    limbs: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, LIMBS), np.int64))
    _pending: int = field(default=0, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.limbs.size == 0:
            self.limbs = np.zeros((self.size, LIMBS), np.int64)
        else:
            self._pending = 1  # they may come from anywhere, in any form

    def add(self, terms: npt.NDArray[np.float64]) -> None:
        """Add one finite term to each sum; what a term has below 2^-352 is cut off.

        Args:
            terms: float64 [size], each below 2^300 in magnitude.
        """
        if self.size <= _FEW:
            for limbs, term in zip(self.limbs, terms.tolist(), strict=True):
                _add_one(limbs, term)
        else:
            self._add_many(terms)
        self._pending += 1
        if self._pending >= _CARRY_AFTER:
            self._carry()

    def _add_many(self, terms: npt.NDArray[np.float64]) -> None:
        fraction, exponent = np.frexp(terms)
        mantissa = (fraction * 2.0**53).astype(np.int64)
        place = exponent.astype(np.int64) - 53 - _LOWEST
        sign = np.sign(mantissa)
        size = np.abs(mantissa)
        if (place < 0).any():
            size >>= np.clip(-place, 0, 63)
            place = np.maximum(place, 0)
        limb, shift = place // _BITS, place % _BITS
        low, high = (size & _MASK) << shift, (size >> _BITS) << shift
        rows = np.arange(self.size)
        self.limbs[rows, limb] += sign * (low & _MASK)
        self.limbs[rows, limb + 1] += sign * ((low >> _BITS) + (high & _MASK))
        self.limbs[rows, limb + 2] += sign * (high >> _BITS)

    def _carry(self) -> None:
        """Bring every limb but the highest into [0, 2^32), the one form that equal sums share."""
        if not self._pending:
            return
        for index in range(LIMBS - 1):
            carried = self.limbs[:, index] >> _BITS  # floors, so that the rest is not negative
            self.limbs[:, index] &= _MASK
            self.limbs[:, index + 1] += carried
        self._pending = 0

    def take_in(self, other: ExactSums) -> None:
        """Add the sums of another, which is left alone."""
        self.limbs += other.limbs
        self._pending += max(1, other._pending)  # limbs in their one form are as large as those of one term
        if self._pending >= _CARRY_AFTER:
            self._carry()

    def merged(self, other: ExactSums) -> ExactSums:
        """Return the sums of both."""
        made = self.copy()
        made.take_in(other)
        made._carry()
        return made

    def copy(self) -> ExactSums:
        """Return sums that can be changed without touching these."""
        self._carry()
        return ExactSums(self.size, self.limbs.copy())

    def canonical(self) -> npt.NDArray[np.int64]:
        """Return the limbs in the form that equal sums share, int64 [size, LIMBS]."""
        self._carry()
        return self.limbs

    def values(self) -> npt.NDArray[np.float64]:
        """Return each sum rounded once to float64, [size]."""
        self._carry()
        made = np.empty(self.size)
        for row in range(self.size):
            whole = 0
            for limb in reversed(self.limbs[row].tolist()):
                whole = (whole << _BITS) + limb
            made[row] = whole / (1 << -_LOWEST)
        return made


def _add_one(limbs: npt.NDArray[np.int64], term: float) -> None:
    """Add one term to one sum, [LIMBS], as `ExactSums._add_many` does."""
    fraction, exponent = math.frexp(term)
    mantissa, place = int(fraction * 2.0**53), exponent - 53 - _LOWEST
    sign, size = (-1, -mantissa) if mantissa < 0 else (1, mantissa)
    if place < 0:
        size, place = size >> -place, 0
    limb, shift = divmod(place, _BITS)
    size <<= shift
    limbs[limb] += sign * (size & _MASK)
    limbs[limb + 1] += sign * (size >> _BITS & _MASK)
    limbs[limb + 2] += sign * (size >> 2 * _BITS)

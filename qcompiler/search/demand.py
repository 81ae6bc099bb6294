"""How much closer to float a plan must be for a bound that no table knows: a metric, or the agreement of arg-maxes.

Such a bound is fitted: the fall of the metric is taken to shrink with the noise, log-linearly between two plans that
were measured, and each plan proves or refutes the level that was asked of it. The level is bracketed from below by
plans that missed the bound and from above by plans that held it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CLOSE_DB = 1.0
"""A bracket that is this narrow is not searched any further."""
_FIRST_STEP_DB, _LEAST_STEP_DB, _MOST_STEP_DB = 4.0, 1.5, 9.0
_DECADE_DB = 15.0
"""By how many dB of noise a metric's fall shrinks tenfold, before two plans say it: flips of an arg-max go with the
amplitude of the noise (20 dB), squared errors with its power (10 dB)."""
_INSIDE = 0.25
"""Share of a bracket that a guess keeps from both its ends."""


@dataclass(frozen=True)
class _Tried:
    margin: float
    fall: float | None


@dataclass
class Demand:
    """Search the least margin, in dB above the bounds on the SQNR, at which another bound holds.

    Attributes:
        level: the margin to ask of the next plan.
        low: best plan that missed the bound.
        high: least plan above it that held.
    """

    level: float = 0.0
    low: _Tried | None = None
    high: _Tried | None = None

    @property
    def active(self) -> bool:
        """Return whether some plan missed the bound."""
        return self.low is not None

    @property
    def closed(self) -> bool:
        """Return whether nothing is left to find: no plan missed the bound, or the bracket is narrow."""
        if self.low is None:
            return True
        return self.high is not None and self.high.margin - self.low.margin <= CLOSE_DB

    def missed(self, margin: float, fall: float | None, allowed: float) -> None:
        """Take in a plan that missed the bound, and ask for more.

        Args:
            margin: its measured SQNR above the bound on it, in dB.
            fall: by how much the metric fell; None if that is not what was missed.
            allowed: by how much it may fall.
        """
        if self.low is None or margin >= self.low.margin:
            self.low = _Tried(margin, fall)
        if self.high is not None and self.high.margin <= self.low.margin:
            self.high = None  # no order among the two: what lies above is searched again
        self._guess(allowed)

    def held(self, margin: float, fall: float | None, allowed: float) -> None:
        """Take in a plan that held the bound, and ask for less."""
        if self.low is None:
            return
        if margin > self.low.margin and (self.high is None or margin < self.high.margin):
            self.high = _Tried(margin, fall)
        self._guess(allowed)

    def repeated(self, allowed: float) -> None:
        """Move on where the level that was asked for gave a plan that was measured already."""
        assert self.low is not None
        if self.high is None:
            self.low = _Tried(max(self.low.margin, self.level), self.low.fall)
        elif self.level - self.low.margin < self.high.margin - self.level:
            self.low = _Tried(self.level, self.low.fall)
        else:
            self.high = _Tried(self.level, self.high.fall)
        self._guess(allowed)

    def _guess(self, allowed: float) -> None:
        low, high = self.low, self.high
        assert low is not None
        if high is None:
            step = _FIRST_STEP_DB
            if low.fall is not None and low.fall > allowed > 0:
                step = _DECADE_DB * math.log10(low.fall / allowed)
            self.level = max(0.0, low.margin) + min(max(step, _LEAST_STEP_DB), _MOST_STEP_DB)
            return
        share = 0.5
        if low.fall is not None and high.fall is not None and low.fall > allowed > high.fall > 0:
            share = math.log(low.fall / allowed) / math.log(low.fall / high.fall)
        share = min(max(share, _INSIDE), 1.0 - _INSIDE)
        self.level = low.margin + share * (high.margin - low.margin)

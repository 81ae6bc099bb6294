"""How many rows will change their arg-max on other data: told from the margins of few rows, not from their flips alone.

Of fifty rows one flip more or less is two points of agreement, while every row's margin, and how far it moved, is
known. With an error of the margin of standard deviation s, a row of margin m flips with probability Phi(-m / s).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

PRIOR_ROWS = 200
"""Rows that the expectation from margins counts for beside the rows that were seen: as a Beta prior of that weight."""
_SUM_OFF = 1e-3

Doubles = npt.NDArray[np.float64]


@dataclass
class Flips:
    """Margins of the rows of one class-like output, between the two highest scores of float.

    Scores that are probabilities are compared by their logarithms, in which errors of decided and undecided rows are
    alike.

    Attributes:
        margins: float32 arrays [rows], one per feed; infinite where the second score is a probability of zero.
        moved: sum of the squared changes of finite margins.
        known: rows of which the change is known.
    """

    margins: list[npt.NDArray[np.float32]] = field(default_factory=list)
    moved: float = 0.0
    known: int = 0

    def add(self, wanted: Doubles, actual: Doubles) -> None:
        """Take in the scores of float and of a candidate, both [..., classes] with at least two classes."""
        a, b = wanted.reshape(-1, wanted.shape[-1]), actual.reshape(-1, wanted.shape[-1])
        pair = np.argpartition(a, -2, axis=-1)[:, -2:]
        before, after = (np.take_along_axis(scores, pair, -1) for scores in (a, b))
        if np.all(a >= 0) and np.all(np.abs(a.sum(-1) - 1.0) < _SUM_OFF):
            with np.errstate(divide="ignore"):
                before, after = np.log(before), np.log(np.maximum(after, 0.0))
        with np.errstate(invalid="ignore"):
            margin, now = before[:, 1] - before[:, 0], after[:, 1] - after[:, 0]
            change = now - margin
        fine = np.isfinite(change)
        self.moved += float(np.square(change[fine]).sum())
        self.known += int(fine.sum())
        self.margins.append(np.where(np.isnan(margin), 0.0, margin).astype(np.float32))

    def kept(self, rows: int, equal: int) -> float:
        """Return the share of rows that is expected to keep its arg-max on other data.

        Args:
            rows: rows that were seen.
            equal: those among them that kept it.
        """
        margins = np.concatenate(self.margins) if self.margins else np.zeros(0, np.float32)
        if margins.size == 0 or self.known == 0:
            return equal / rows if rows else 1.0
        spread = math.sqrt(self.moved / self.known)
        told = float(ndtr(margins / spread).mean()) if spread > 0 else 1.0
        return (equal + PRIOR_ROWS * told) / (rows + PRIOR_ROWS)

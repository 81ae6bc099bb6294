"""Choose range estimators by measurement: the best for the whole model, then region by region."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompiler.search import quality

Errors = npt.NDArray[np.float64]
Evaluate = Callable[[str, Mapping[str, str]], Errors]
"""(estimator of all groups, other estimators by group) to the relative error power of each row of the outputs."""


@dataclass(frozen=True)
class RangeTerms:
    """How far the search goes.

    Attributes:
        regions: parts of the network, in program order, that change their estimator together.
        alternates: estimators tried per region besides the best for the whole model: the next best ones.
        behind_db: an estimator that is worse for the whole model by more than this is no alternate.
        doubt: how many standard errors the best must gain over the first choice to be taken for the whole model.
        certainty: how many standard errors a gain must measure for a region to depart from the rest; a gain in one row
            alone is one standard error.
    """

    regions: int = 16
    alternates: int = 2
    behind_db: float = 4.0
    doubt: float = 1.0
    certainty: float = 1.5


@dataclass(frozen=True)
class RangeChoice:
    """What the search found.

    Attributes:
        estimator: for all groups without one of their own.
        estimators: by group, where a region departs from it.
        whole_db: SQNR per estimator for the whole model.
        sqnr_db: SQNR of the choice.
        tried: builds measured.
    """

    estimator: str
    estimators: dict[str, str] = field(default_factory=dict)
    whole_db: dict[str, float] = field(default_factory=dict)
    sqnr_db: float = 0.0
    tried: int = 0


def choose_ranges(
    choices: Sequence[str], groups: Sequence[str], evaluate: Evaluate, terms: RangeTerms = RangeTerms()
) -> RangeChoice:
    """Measure each estimator on the whole model, then let regions depart from the best where that is measured to help.

    Per tensor the least expected error is known without measuring (``mse``, behind the function that follows). What
    that cannot know is how much of an error reaches the output: one clipped outlier of a residual stream may matter
    more than the rounding noise of a whole layer. So regions are measured, one after the other, each with what was
    kept before it: at most ``len(choices) + regions * alternates`` builds.

    Args:
        choices: estimators; the first is the one expected to be best.
        groups: names in program order of the groups that may have an estimator of their own.
        evaluate: builds and measures.
        terms: how far to go.
    """
    measured = {name: evaluate(name, {}) for name in choices}
    whole = {name: round(decibels(errors), 2) for name, errors in measured.items()}
    order = sorted(choices, key=lambda name: float(measured[name].sum()))
    expected = measured[choices[0]]
    # Differences within chance do not overrule what is expected to be best.
    best = order[0] if surely_less(measured[order[0]], expected, terms.doubt) else choices[0]
    tried, kept = len(choices), dict[str, str]()
    level = measured[best]
    # An estimator that measures the same to the last digit gives the same ranges.
    near = [n for n in order if whole[n] >= whole[best] - terms.behind_db and (measured[n] != level).any()]
    for region in split_evenly(groups, terms.regions):
        for name in near[: terms.alternates]:
            trial = {**kept, **dict.fromkeys(region, name)}
            errors = evaluate(best, trial)
            tried += 1
            if surely_less(errors, level, terms.certainty):
                level, kept = errors, trial
    return RangeChoice(best, kept, whole, round(decibels(level), 2), tried)


def decibels(errors: Errors) -> float:
    """Return the SQNR in dB of relative error powers; 200 for no error at all, -200 for one without bound."""
    return quality.decibels(float(errors.sum()))


def surely_less(errors: Errors, than: Errors, certainty: float) -> bool:
    """Return whether a sum of errors is less than another by so many standard errors of the difference, row by row.

    A difference that a few rows make says nothing about other data.
    """
    with np.errstate(invalid="ignore"):
        gain = than - errors
    if not np.isfinite(gain).all():
        return False
    return float(gain.sum()) > certainty * math.sqrt(gain.size) * float(gain.std())


def split_evenly(names: Sequence[str], parts: int) -> list[tuple[str, ...]]:
    """Cut a sequence into at most ``parts`` runs whose lengths differ by one at most."""
    parts = min(parts, len(names))
    borders = [len(names) * i // parts for i in range(parts + 1)] if parts else [0]
    return [tuple(names[a:b]) for a, b in itertools.pairwise(borders)]

"""Expected agreement from margins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import softmax

from qcompiler.search.flips import PRIOR_ROWS, Flips

Doubles = npt.NDArray[np.float64]


def scores(rows: int, seed: int, noise: float = 0.5) -> tuple[Doubles, Doubles]:
    rng = np.random.default_rng(seed)
    wanted = rng.standard_normal((rows, 10)) * 3.0
    return wanted, wanted + noise * rng.standard_normal((rows, 10))


def kept(wanted: Doubles, actual: Doubles) -> tuple[float, float]:
    """Return the share of rows that kept their arg-max, and the one that is expected."""
    flips, equal = Flips(), int((wanted.argmax(-1) == actual.argmax(-1)).sum())
    flips.add(wanted, actual)
    return equal / len(wanted), flips.kept(len(wanted), equal)


def test_few_rows_tell_what_many_show() -> None:
    truth = kept(*scores(200_000, 0))[0]
    seen, told = zip(*(kept(*scores(50, seed)) for seed in range(1, 200)), strict=True)
    assert np.mean(told) == pytest.approx(truth, abs=0.02)
    assert np.std(told) < 0.5 * np.std(seen)


def test_probabilities_tell_what_their_logits_tell() -> None:
    wanted, actual = scores(80, 3)
    assert kept(softmax(wanted, -1), softmax(actual, -1)) == pytest.approx(kept(wanted, actual), abs=1e-6)


def test_many_rows_are_believed() -> None:
    wanted, actual = scores(20_000, 4)
    seen, told = kept(wanted, actual)
    assert told == pytest.approx(seen, abs=0.002)


def test_equal_scores_keep_every_row() -> None:
    wanted, _ = scores(5, 5)
    assert kept(wanted, wanted) == (1.0, 1.0)


def test_rows_are_counted_over_feeds_and_leading_axes() -> None:
    wanted, actual = scores(24, 6)
    parts, whole = Flips(), Flips()
    parts.add(wanted[:12].reshape(3, 4, 10), actual[:12].reshape(3, 4, 10))
    parts.add(wanted[12:], actual[12:])
    whole.add(wanted, actual)
    assert parts.kept(24, 20) == pytest.approx(whole.kept(24, 20))


def test_a_certain_probability_does_not_flip() -> None:
    certain = np.asarray([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0]])
    flips = Flips()
    flips.add(certain, np.asarray([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]]))
    margin = np.log(0.6 / 0.4)  # moved by twice itself
    told = (1.0 + 0.69146) / 2  # Phi(1/2)
    assert flips.moved == pytest.approx((2 * margin) ** 2)
    assert flips.kept(2, 1) == pytest.approx((1 + PRIOR_ROWS * told) / (2 + PRIOR_ROWS), abs=1e-4)

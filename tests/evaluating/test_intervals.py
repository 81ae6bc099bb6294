"""Intervals and tests: known figures, known coverage, the same draws from the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.evaluating.intervals import (
    bootstrap_sums,
    exact_mcnemar,
    of_paired_shares,
    of_ratio,
    of_share,
    of_sum,
)


def test_the_same_seed_draws_the_same() -> None:
    columns = np.random.default_rng(0).standard_normal((40, 2))
    first, second = bootstrap_sums(columns, 50, seed=3), bootstrap_sums(columns, 50, seed=3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, bootstrap_sums(columns, 50, seed=4))


def test_columns_of_a_row_are_drawn_together() -> None:
    columns = np.stack([np.arange(30.0), 2 * np.arange(30.0)], 1)
    drawn = bootstrap_sums(columns, 100)
    assert drawn[:, 1] == pytest.approx(2 * drawn[:, 0])


def test_drawing_in_pieces_gives_whole_samples() -> None:
    # Every row counts 1, so each drawn sum is the number of rows, however the draws are cut up.
    assert np.all(bootstrap_sums(np.ones((60_000, 1)), 80) == 60_000)


def test_the_bootstrap_covers_a_known_difference() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        differences = generator.normal(0.3, 1.0, 80) / 80
        found = of_sum(differences, seed)
        assert found is not None
        covered += found.covers(0.3)
    assert covered >= 88, "95 % of 100, less three deviations"


def test_the_width_is_that_of_theory() -> None:
    values = np.random.default_rng(2).standard_normal(400)
    found = of_sum(values / 400)
    assert found is not None
    half = 1.96 * values.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_one_sample_has_no_interval() -> None:
    assert of_sum(np.ones(1)) is None
    assert of_ratio(np.ones((1, 2)), lambda t: t[:, 0]) is None
    assert of_ratio(np.asarray([[1.0, np.inf], [1.0, 1.0]]), lambda t: t[:, 0]) is None
    assert of_share(0, 0) is None


def test_mcnemar_is_the_binomial() -> None:
    assert exact_mcnemar(0, 0) == 1.0
    assert exact_mcnemar(0, 5) == pytest.approx(2 / 32)
    assert exact_mcnemar(3, 3) == pytest.approx(1.0)
    assert exact_mcnemar(10, 1) == pytest.approx(2 * (1 + 11) / 2**11)


def test_no_discordant_sample_is_no_certainty() -> None:
    found = of_paired_shares(0, 0, 100)
    assert found.low == -found.high
    assert 0.02 < found.high < 0.06, "about three over the number of samples"
    exact = of_share(0, 100)
    assert exact is not None
    assert (exact.low, exact.high) == (0.0, pytest.approx(1 - 0.025**0.01))


def test_paired_shares_cover_a_known_difference() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        kinds = generator.choice(3, 200, p=[0.95, 0.01, 0.04])
        covered += of_paired_shares(int((kinds == 1).sum()), int((kinds == 2).sum()), 200).covers(-0.03)
    assert covered >= 300 * 0.92

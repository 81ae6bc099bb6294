"""Rounding by the error of the product: never worse than to nearest, and right where it can be checked by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcompiler.quant.rounding import (
    Float,
    Int,
    output_error,
    round_nearest,
    round_sequentially,
    round_softly,
)

LIMITS = (-7, 7)


def case(seed: int, rows: int, columns: int, rank: int = 3) -> tuple[Float, Float, Float, Float]:
    """Return weight, scale, zero point and the moments of inputs that have much in common."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(rows, columns))
    scale = np.abs(weight).max(axis=0, keepdims=True) / LIMITS[1]
    x = rng.normal(size=(500, rank)) @ rng.normal(size=(rank, rows)) + 0.3 * rng.normal(size=(500, rows)) + 0.5
    return weight, scale, np.zeros_like(scale), x.T @ x / 500


def error(weight: Float, scale: Float, zero: Float, codes: Int, moments: Float) -> Float:
    return output_error((codes - zero) * scale - weight, moments)


@pytest.mark.parametrize(("rounder", "share"), [(round_sequentially, 0.25), (round_softly, 0.6)])
def test_products_come_closer_where_inputs_have_something_in_common(rounder, share: float) -> None:  # type: ignore[no-untyped-def]
    weight, scale, zero, moments = case(0, 100, 8)
    codes = rounder(weight, scale, zero, LIMITS, moments)
    nearest = round_nearest(weight, scale, zero, LIMITS)
    before, after = (error(weight, scale, zero, c, moments).sum() for c in (nearest, codes))
    assert after < share * before
    assert codes.min() >= LIMITS[0]
    assert codes.max() <= LIMITS[1]


@pytest.mark.parametrize("rounder", [round_sequentially, round_softly])
def test_independent_inputs_leave_every_weight_at_its_nearest(rounder) -> None:  # type: ignore[no-untyped-def]
    weight, scale, zero, _ = case(1, 20, 4)
    np.testing.assert_array_equal(
        rounder(weight, scale, zero, LIMITS, np.diag(np.linspace(0.1, 5, 20))),
        round_nearest(weight, scale, zero, LIMITS),
    )


@pytest.mark.parametrize("rounder", [round_sequentially, round_softly])
def test_no_column_gets_worse_and_most_come_near_the_best_of_all_choices(rounder) -> None:  # type: ignore[no-untyped-def]
    weight, scale, zero, moments = case(2, 8, 12)
    codes = rounder(weight, scale, zero, LIMITS, moments)
    nearest = error(weight, scale, zero, round_nearest(weight, scale, zero, LIMITS), moments)
    found = error(weight, scale, zero, codes, moments)
    assert (found <= nearest).all()
    floor = np.floor(weight / scale)
    best = np.full(12, np.inf)
    for up in itertools.product((0, 1), repeat=8):
        best = np.minimum(best, error(weight, scale, zero, (floor + np.array(up)[:, None]).astype(np.int64), moments))
    assert np.median(found / best) < 1.8
    assert np.median(nearest / best) > 2.5


def test_zero_points_and_scales_per_block_are_kept() -> None:
    weight, _, _, moments = case(3, 32, 4)
    scale = np.repeat(np.abs(weight.reshape(2, 16, 4)).max(axis=1), 16, axis=0) / 7
    zero = np.full_like(scale, 8.0)
    codes = round_sequentially(weight, scale, zero, (0, 15), moments)
    assert (codes >= 0).all()
    assert np.abs((codes - zero) * scale - weight).max() <= 4 * scale.max()
    nearest = round_nearest(weight, scale, zero, (0, 15))
    assert error(weight, scale, zero, codes, moments).sum() < error(weight, scale, zero, nearest, moments).sum()


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, scale, zero, moments = case(4, 10, 3)
    moments[2:5] = moments[:, 2:5] = 0.0
    assert np.isfinite(round_sequentially(weight, scale, zero, LIMITS, moments)).all()
    np.testing.assert_array_equal(
        round_sequentially(weight, scale, zero, LIMITS, np.zeros((10, 10))), round_nearest(weight, scale, zero, LIMITS)
    )


def inverse_of_hessian(weight: Float, scale: Float, moments: Float) -> Int:
    """Round as GPTQ's own text says it: row by row, with the Cholesky factor of the inverse of H."""
    order = np.argsort(-np.diag(moments), kind="stable")
    damped = moments[np.ix_(order, order)] + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    left, codes = weight[order].copy(), np.zeros(weight.shape, np.int64)
    for row in range(len(left)):
        codes[order[row]] = np.clip(np.rint(left[row] / scale[0]), *LIMITS)
        error = (left[row] - codes[order[row]] * scale[0]) / upper[row, row]
        left[row + 1 :] -= np.outer(upper[row, row + 1 :], error)
    return codes


def test_the_factor_of_h_rounds_as_that_of_its_inverse_does() -> None:
    weight, scale, zero, moments = case(5, 150, 6)
    wanted = inverse_of_hessian(weight, scale, moments)
    found = round_sequentially(weight, scale, zero, LIMITS, moments)
    gains = error(weight, scale, zero, wanted, moments) < error(
        weight, scale, zero, round_nearest(weight, scale, zero, LIMITS), moments
    )
    assert gains.sum() >= 5
    np.testing.assert_array_equal(found[:, gains], wanted[:, gains])


@pytest.mark.parametrize("rounder", [round_sequentially, round_softly])
def test_matrices_side_by_side_are_rounded_as_one_by_one(rounder) -> None:  # type: ignore[no-untyped-def]
    cases = [case(seed, 70, 3) for seed in range(4)]
    weight, scale, zero, moments = (np.stack(parts) for parts in zip(*cases, strict=True))
    together = rounder(weight, scale, zero, LIMITS, moments)
    for codes, each in zip(together, cases, strict=True):
        np.testing.assert_array_equal(codes, rounder(*each[:3], LIMITS, each[3]))


def test_float32_gives_nearly_the_same_errors() -> None:
    weight, scale, zero, moments = case(6, 200, 8)
    wide = round_sequentially(weight, scale, zero, LIMITS, moments)
    narrow = round_sequentially(
        weight.astype(np.float32), scale.astype(np.float32), zero.astype(np.float32), LIMITS,
        moments.astype(np.float32),
    )  # fmt: skip
    a, b = (error(weight, scale, zero, codes, moments).sum() for codes in (wide, narrow))
    assert abs(a - b) < 0.02 * a

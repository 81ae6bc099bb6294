"""Scales between layers: what the expected error says, and that the chosen scale makes it less."""

from __future__ import annotations

import numpy as np

from qcompiler.quant.equalization import Activation, Float, Reader, best_scale, class_scale, expected_error


def reader(weight: Float, mean_square: Float, ids: list[int]) -> Reader:
    """Return a product [outputs, channels] of one tap."""
    size = np.abs(weight)[None]
    return Reader(np.array([ids]), size, np.square(weight).sum(axis=0)[None], 1, mean_square[None])


def case(spread: Float, weight: Float) -> tuple[list[Activation], list[Reader], int]:
    ids = list(range(len(spread)))
    value = Activation(np.array(ids), -spread, spread)
    return [value], [reader(weight, np.square(spread) / 9, ids)], len(ids)


def test_the_expected_error_is_what_rounding_does() -> None:
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 2.0, 20.0, 0.5])
    weight = rng.normal(size=(6, 4))
    x = rng.uniform(-1, 1, (20000, 4)) * spread
    x[0], x[1] = spread, -spread
    s = np.array([0.5, 1.0, 5.0, 0.4])
    step = 2 * (spread / s).max() / 255
    rounded = np.rint(x / s / step) * step
    columns = np.abs(weight * s).max(axis=1, keepdims=True) / 127
    codes = np.rint(weight * s / columns) * columns
    error = np.square(rounded @ codes.T - x @ weight.T).sum(axis=1).mean()
    found = expected_error(
        [Activation(np.arange(4), -spread, spread)], [reader(weight, np.square(x).mean(axis=0), [0, 1, 2, 3])], s
    )
    signal = (np.square(weight).sum(axis=0) * np.square(x).mean(axis=0)).sum()
    assert 0.6 < error / (found * signal) < 1.6


def test_a_loud_channel_is_divided_and_the_error_falls() -> None:
    terms = case(np.array([1.0] * 15 + [60.0]), np.random.default_rng(1).normal(size=(8, 16)) / ([1.0] * 15 + [60.0]))
    (alpha, strength), factor = best_scale(*terms)
    assert factor > 20
    scale = class_scale(*terms, alpha, strength)
    assert scale[15] > 5 * scale[0]
    np.testing.assert_allclose(np.exp(np.log(scale).mean()), 1.0, rtol=1e-9)


def test_even_channels_gain_nothing() -> None:
    _, factor = best_scale(*case(np.ones(16), np.sign(np.random.default_rng(2).normal(size=(8, 16)))))
    assert factor == 1.0


def test_a_depthwise_weight_takes_any_spread() -> None:
    spread = np.array([1.0, 100.0, 10.0])
    weight = np.ones((3, 1, 1))
    value = Activation(np.arange(3), -spread, spread)
    depthwise = Reader(np.arange(3)[:, None], weight, weight[:, 0], 9, spread[:, None] ** 2)
    np.testing.assert_allclose(class_scale([value], [depthwise], 3, 1.0, 1.0), spread / 10.0)


def test_channels_that_cannot_be_scaled_keep_their_numbers() -> None:
    value = Activation(np.array([0, 1, -1]), -np.ones(3), np.array([1.0, 8.0, 2.0]))
    readers = [reader(np.ones((2, 3)), np.ones(3), [0, 1, -1])]
    assert len(class_scale([value], readers, 2, 1.0, 1.0)) == 2
    assert np.isfinite(expected_error([value], readers, np.array([0.3, 3.0])))


def test_a_channel_that_is_always_zero_does_not_run_away() -> None:
    terms = case(np.array([0.0, 1.0, 2.0]), np.ones((2, 3)))
    scale = class_scale(*terms, 1.0, 1.0)
    assert scale.max() / scale.min() <= 2.0**12 * (1 + 1e-9)

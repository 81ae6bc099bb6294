"""Pairs of products that saturate at 16 bits: the emulation by hand, and weights that no activation can saturate."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant.arithmetic import dequantize, fit_bias, quantize, weight_params
from qcompiler.quant.saturation import (
    PAIR_REACH,
    pair_reach,
    pair_safe_params,
    pair_saturated_matmul,
    pair_sums,
    pairs_fit,
    saturation_share,
    summed_columns,
)
from qcompiler.quant.spec import QuantSpec

CASES = settings(max_examples=60, deadline=None, derandomize=True)
S8 = QuantSpec("int8", symmetric=True, narrow=True)
SHAPES = {"MatMul": ((96, 24), 1), "Gemm": ((33, 7), 1), "Conv": ((12, 6, 3, 3), 0), "LSTM": ((2, 32, 17), None)}


def u8(*rows: list[int]) -> np.ndarray:
    return np.asarray(rows, np.uint8)


def s8(*rows: list[int]) -> np.ndarray:
    return np.asarray(rows, np.int8)


def exact(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return x.astype(np.int64) @ w.astype(np.int64)


def random(seed: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 [M, K] and int8 [K, N] with weights in [low, high]; every third activation is the largest."""
    rng = np.random.default_rng(seed)
    m, k, n = rng.integers(1, 6), rng.integers(1, 40), rng.integers(1, 6)
    x = rng.integers(0, 256, (m, k)).astype(np.uint8)
    x[rng.random(x.shape) < 1 / 3] = 255
    return x, rng.integers(low, high + 1, (k, n)).astype(np.int8)


# ---- the emulation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "w", "wanted"),
    [
        (u8([255, 255]), s8([127], [127]), 32767),  # 64770
        (u8([255, 255]), s8([-128], [-128]), -32768),  # -65280
        (u8([255, 255]), s8([127], [-128]), -255),
        (u8([255, 255, 255, 255]), s8([127], [127], [127], [127]), 2 * 32767),
        (u8([255, 255, 255]), s8([127], [127], [127]), 32767 + 32385),  # the third is a pair of its own
        (u8([255, 0, 255]), s8([127], [127], [127]), 2 * 32385),
        (u8([255, 255]), s8([64], [64]), 32640),
        (u8([255, 255]), s8([65], [64]), 32767),  # 32895
        (u8([255, 255]), s8([-64], [-64]), -32640),
        (u8([128, 128]), s8([127], [127]), 32512),  # half an activation
    ],
)
def test_a_pair_saturates_before_it_is_widened(x: np.ndarray, w: np.ndarray, wanted: int) -> None:
    made = pair_saturated_matmul(x, w)
    assert made.dtype == np.int32
    np.testing.assert_array_equal(made, [[wanted]])


def test_neighbours_are_rows_of_the_reduced_dimension() -> None:
    x = u8([255, 255, 0, 0], [255, 0, 255, 0], [0, 255, 255, 0])
    w = np.full((4, 1), 127, np.int8)
    np.testing.assert_array_equal(pair_saturated_matmul(x, w), [[32767], [2 * 32385], [2 * 32385]])
    assert saturation_share(x, w) == 1 / 6
    assert pair_sums(x, w).shape == (3, 2, 1)


def test_random_8_bit_weights_saturate_and_lose_what_is_above() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(128, 256, (8, 64)).astype(np.uint8)
    w = rng.integers(-128, 128, (64, 16)).astype(np.int8)
    made, sums = pair_saturated_matmul(x, w), pair_sums(x, w)
    over = np.maximum(sums - 32767, 0) - np.maximum(-32768 - sums, 0)
    assert (over != 0).mean() == saturation_share(x, w) > 0.05
    np.testing.assert_array_equal(made, exact(x, w) - over.sum(axis=1))


@CASES
@given(st.integers(0, 10**6))
def test_7_bit_weights_never_saturate(seed: int) -> None:
    x, w = random(seed, -64, 64)
    np.testing.assert_array_equal(pair_saturated_matmul(x, w), exact(x, w))
    assert saturation_share(x, w) == 0
    assert pairs_fit(w).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_extreme_corner_of_7_bits_fits_and_one_more_does_not(sign: int) -> None:
    x = np.full((2, 50), 255, np.uint8)
    w = np.full((50, 3), sign * 64, np.int8)
    np.testing.assert_array_equal(pair_saturated_matmul(x, w), exact(x, w))
    w[7] += sign
    w[8] += sign  # of two pairs, one more each
    assert abs(int(pair_saturated_matmul(x, w)[0, 0])) < abs(int(exact(x, w)[0, 0]))
    assert not pairs_fit(w).any()


@pytest.mark.parametrize(("xt", "wt"), [(np.int8, np.int8), (np.uint8, np.uint8), (np.int8, np.uint8)])
def test_types_that_take_other_kernels_are_refused(xt: type, wt: type) -> None:
    with pytest.raises(ValueError, match=f"expected uint8 and int8, found {xt.__name__} and {wt.__name__}"):
        pair_saturated_matmul(np.ones((2, 4), xt), np.ones((4, 2), wt))


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found \(2, 4\) and \(3, 2\)"):
        pair_sums(np.ones((2, 4), np.uint8), np.ones((3, 2), np.int8))


def test_nothing_to_multiply_saturates_nothing() -> None:
    x, w = np.ones((2, 0), np.uint8), np.ones((0, 3), np.int8)
    np.testing.assert_array_equal(pair_saturated_matmul(x, w), np.zeros((2, 3)))
    assert saturation_share(x, w) == 0
    assert pairs_fit(w).all()


# ---- the order in which kernels add ----------------------------------------------------------------------------------


def test_a_convolution_adds_channels_first() -> None:
    weight = np.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    columns = summed_columns(weight, "Conv")
    assert columns.shape == (12, 2)
    np.testing.assert_array_equal(columns[:4, 0], [weight[0, 0, 0, 0], weight[0, 1, 0, 0], weight[0, 2, 0, 0], 1])
    np.testing.assert_array_equal(summed_columns(weight[:, :, :, 0], "Conv")[:3, 1], weight[1, :, 0, 0])


def test_products_and_recurrences_add_along_the_inputs() -> None:
    weight = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(summed_columns(weight, "MatMul"), weight)
    lstm = np.arange(2 * 8 * 5).reshape(2, 8, 5)
    columns = summed_columns(lstm, "LSTM")
    assert columns.shape == (5, 16)
    np.testing.assert_array_equal(columns[:, 9], lstm[1, 1])
    with pytest.raises(ValueError, match="no kernel of GRU is known"):
        summed_columns(lstm, "GRU")


# ---- weights that fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "reach"),
    [([[3], [4], [5]], 7), ([[3], [-4], [5]], 5), ([[-3], [-4], [2], [4]], 7), ([[100], [-100]], 100), ([[9]], 9)],
)
def test_the_reach_of_a_pair_is_its_sum_of_one_sign(columns: list[list[int]], reach: int) -> None:
    assert pair_reach(np.asarray(columns)) == [reach]


@CASES
@given(st.integers(0, 10**6))
def test_weights_fit_if_and_only_if_no_activation_saturates_them(seed: int) -> None:
    _, w = random(seed, -128, 127)
    for column in range(w.shape[1]):
        one = w[:, column : column + 1]
        worst = [np.where(one[:, 0] * sign > 0, 255, 0).astype(np.uint8) for sign in (-1, 1)]
        saturated = saturation_share(np.stack(worst), one) > 0
        assert bool(pairs_fit(one)[0]) is not saturated


@pytest.mark.parametrize("op_type", SHAPES)
@CASES
@given(seed=st.integers(0, 10**6), tail=st.sampled_from(["normal", "laplace", "flat", "signs"]))
def test_safe_scales_are_safe_and_at_least_as_fine_as_7_bits(op_type: str, seed: int, tail: str) -> None:
    shape, axis = SHAPES[op_type]
    rng = np.random.default_rng(seed)
    weight = {
        "normal": rng.standard_normal(shape), "laplace": rng.laplace(size=shape), "flat": np.ones(shape),
        "signs": rng.choice([-1.0, 0.0, 1.0], shape),
    }[tail].astype(np.float32)  # fmt: skip
    spec = QuantSpec("int8", axis=axis, symmetric=True, narrow=True)
    made = pair_safe_params(weight, spec, op_type)
    assert pairs_fit(summed_columns(quantize(weight, made), op_type)).all()
    eight, half = weight_params(weight, spec), np.abs(weight).max() / 64
    assert made.scale.shape == eight.scale.shape
    assert (made.scale >= eight.scale).all()
    assert (made.scale <= half * (1 + 1e-6)).all()


def test_a_channel_without_crowded_pairs_keeps_all_8_bits() -> None:
    weight = np.asarray([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]], np.float32)
    spec = QuantSpec("int8", axis=1, symmetric=True, narrow=True)
    made = pair_safe_params(weight, spec, "MatMul")
    np.testing.assert_array_equal(quantize(weight, made), [[127, 64], [0, 64], [127, -64], [-127, -64]])


def test_one_scale_for_all_channels_obeys_the_worst() -> None:
    weight = np.asarray([[1.0, 1.0], [0.0, 1.0]], np.float32)
    made = pair_safe_params(weight, S8, "MatMul")
    assert made.scale.shape == ()
    np.testing.assert_array_equal(quantize(weight, made), [[64, 64], [0, 64]])


def test_a_range_of_7_bits_is_given_back() -> None:
    weight = np.asarray([[1.0], [-1.0]], np.float32)
    spec = QuantSpec("int8", axis=1, symmetric=True, narrow=True, bits=7)
    assert pair_safe_params(weight, spec, "MatMul").spec.limits == (-127, 127)
    np.testing.assert_array_equal(quantize(weight, pair_safe_params(weight, spec, "MatMul")), [[127], [-127]])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1)])
def test_weights_of_hardly_any_size_are_taken(shape: tuple[int, int]) -> None:
    spec = QuantSpec("int8", axis=1, symmetric=True, narrow=True)
    made = pair_safe_params(np.ones(shape, np.float32), spec, "MatMul")
    assert made.scale.shape == (shape[1],)
    np.testing.assert_array_equal(quantize(np.ones(shape, np.float32), made), np.full(shape, 127))


def test_a_weight_of_zeros_and_subnormal_numbers_is_taken() -> None:
    weight = np.zeros((6, 2), np.float32)
    weight[:, 1] = 1e-40
    spec = QuantSpec("int8", axis=1, symmetric=True, narrow=True)
    made = pair_safe_params(weight, spec, "MatMul")
    assert pairs_fit(quantize(weight, made)).all()
    assert (made.scale > 0).all()


@CASES
@given(st.integers(0, 10**6), st.floats(0.0, 30.0))
def test_a_scale_raised_for_the_bias_stays_safe(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((40, 8)).astype(np.float32)
    made = pair_safe_params(weight, QuantSpec("int8", axis=1, symmetric=True, narrow=True), "MatMul")
    bias = (rng.standard_normal(8) * 10.0**size).astype(np.float32)
    raised = fit_bias(made, 1e-3, bias, np.zeros(8, np.bool_))
    assert (raised.scale >= made.scale).all()
    assert pairs_fit(quantize(weight, raised)).all()


@pytest.mark.parametrize(("k", "least_gain", "least_kept"), [(64, 3.0, 1.0), (768, 2.5, 1.0)])
def test_safe_scales_keep_most_of_what_7_bits_lose(k: int, least_gain: float, least_kept: float) -> None:
    weight = np.random.default_rng(1).standard_normal((k, 64)).astype(np.float32)
    spec = QuantSpec("int8", axis=1, symmetric=True, narrow=True)
    seven = weight_params(weight, QuantSpec("int8", axis=1, symmetric=True, narrow=True, bits=7))
    found = {}
    for name, params in (
        ("8", weight_params(weight, spec)),
        ("7", seven),
        ("safe", pair_safe_params(weight, spec, "MatMul")),
    ):
        error = np.square(weight - dequantize(quantize(weight, params), params)).sum()
        found[name] = 10 * np.log10(np.square(weight).sum() / error)
    # Normal numbers: 6.1 dB between 8 and 7 bits, of which 3.6 to 4 come back (seen: 44.7, 42.6, 38.7 for K of 64).
    assert found["safe"] - found["7"] > least_gain
    assert found["8"] - found["safe"] > least_kept
    assert PAIR_REACH == 128

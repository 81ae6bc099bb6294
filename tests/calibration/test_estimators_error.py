"""The estimators that search for the least error: against brute force on the histogram's points."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.histogram import points_of
from qcompiler.calibration.squared_error import SqnrGrid, best_sqnr, keep_short_side, least_squares, sqnr_candidates
from qcompiler.calibration.statistics import TensorStatistics
from qcompiler.calibration.through import THROUGH, function_of
from qcompiler.quant.spec import QuantSpec, affine_params
from tests.calibration.estimator_samples import SAMPLES, seen, squared_error

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
INT8 = QuantSpec("int8", symmetric=True)
THROUGHS = ("", "relu", "silu", "gelu", "tanh", "sigmoid", "hard-swish", "softmax", "clip(-0.5,1)")


def model_error(tensor: TensorStatistics, low: float, high: float, steps: int, through: str, reach: float) -> float:
    """Return the expected error of one range, written down as it is defined, one bin after the other.

    ``reach`` is what ``steps`` steps span: high - low, or high if symmetric.
    """
    function = function_of(through, tensor)
    half, width = tensor.counts.size // 2, tensor.width
    filled = np.flatnonzero(tensor.counts)
    total = 0.0
    for index in filled.tolist():
        count = int(tensor.counts[index]) - (tensor.zeros if index == half else 0)
        start = (index - half) * width
        value = start + width / 2
        if index == filled[0] and tensor.minimum < 0:
            value = tensor.minimum
        if index == filled[-1] and tensor.maximum > 0:
            value = tensor.maximum
        ends = function(np.array([start, start + width, value, min(max(value, low), high)]))
        if low < value < high:
            total += count * (reach / steps) ** 2 / 12 * float((ends[1] - ends[0]) / width) ** 2
        else:
            total += count * float(ends[3] - ends[2]) ** 2
    return total


def borders(tensor: TensorStatistics) -> tuple[list[float], list[float]]:
    """Return every candidate below and above zero."""
    low, high = min(tensor.minimum, 0.0), max(tensor.maximum, 0.0)
    lows = sorted({max(-k * tensor.width, low) for k in range(math.ceil(-low / tensor.width) + 1)})
    highs = sorted({min(k * tensor.width, high) for k in range(math.ceil(high / tensor.width) + 1)})
    return lows, highs


def coarse(values: np.ndarray, bins: int) -> TensorStatistics:
    """Return statistics with few filled bins: one far value makes them wide."""
    tensor = seen(values)
    tensor._fold_to(tensor.exponent + int(math.log2(tensor.counts.size / 2 / bins)))
    return tensor


@pytest.mark.parametrize("through", THROUGHS)
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_the_brute_force_optimum_over_bin_borders(name: str, through: str) -> None:
    tensor = coarse(SAMPLES[name], 32)
    lows, highs = borders(tensor)
    for steps in (255, 15):
        pairs = [(lo, hi) for lo in lows for hi in highs]
        errors = [model_error(tensor, lo, hi, steps, through, hi - lo) for lo, hi in pairs]
        found = least_squares(points_of(tensor), steps, function_of(through, tensor))
        assert found in pairs
        least, mine = min(errors), errors[pairs.index(found)]
        scale = model_error(tensor, 0.0, 0.0, steps, through, 0.0)
        assert mine <= least * (1 + 1e-9) + 1e-12 * scale


@pytest.mark.parametrize("through", ["", "relu", "tanh"])
@pytest.mark.parametrize("name", SAMPLES)
def test_symmetric_mse_is_the_brute_force_optimum(name: str, through: str) -> None:
    tensor = coarse(SAMPLES[name], 64)
    lows, highs = borders(tensor)
    largest = max(-lows[0], highs[-1])
    for steps in (127, 7):
        reaches = [-lo for lo in lows] if largest == -lows[0] else highs
        errors = {r: model_error(tensor, max(lows[0], -r), min(highs[-1], r), steps, through, r) for r in reaches}
        low, high = least_squares(points_of(tensor), steps, function_of(through, tensor), symmetric=True)
        assert lows[0] <= low <= 0 <= high <= highs[-1]
        assert errors[max(-low, high)] <= min(errors.values()) * (1 + 1e-9) + 1e-12 * max(errors.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_mse_over_fine_bins_is_no_worse_than_any_pair_on_a_grid(name: str) -> None:
    tensor = seen(SAMPLES[name])
    low, high = least_squares(points_of(tensor), 255, function_of("", tensor))
    mine = model_error(tensor, low, high, 255, "", high - low)
    lows, highs = borders(tensor)
    for lo in lows[:: max(1, len(lows) // 12)]:
        for hi in highs[:: max(1, len(highs) // 12)]:
            assert mine <= model_error(tensor, lo, hi, 255, "", hi - lo) * (1 + 1e-9)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_close_to_the_best_that_true_rounding_has(name: str, bits: int) -> None:
    values = SAMPLES[name][-10_000:]
    lows = np.linspace(0, min(values.min(), 0), 41) if values.min() < 0 else [0.0]
    highs = np.linspace(0, max(values.max(), 0), 41) if values.max() > 0 else [0.0]
    best = min(squared_error(values, lo, hi, bits) for lo in lows for hi in highs if hi > lo)
    # With an exact zero the ends move by up to half a step, which the model does not see: with 15 steps by a thirtieth
    # of the range, so the scale by 3 %; what then falls off an end or is left unused costs as much again.
    tolerance = 1.02 if bits == 8 else 1.12
    assert squared_error(values, *estimate(seen(values), f"mse:{bits}"), bits) <= tolerance * best


def test_mse_beats_min_max_with_one_outlier() -> None:
    values = SAMPLES["outlier"]
    low, high = estimate(seen(values), "mse")
    assert high < 60
    assert squared_error(values, low, high) < 0.9 * squared_error(values, values.min(), values.max())


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (1.0, 0.5), (-1.0, 4.0)])
def test_mse_clips_a_uniform_distribution_by_less_than_a_step(shift: float, stretch: float) -> None:
    values = (np.linspace(-1, 1, 20001) + shift) * stretch
    tensor = seen(values)
    low, high = estimate(tensor, "mse")
    step = (tensor.maximum - tensor.minimum) / 255
    assert 0 <= low - min(tensor.minimum, 0.0) <= step
    assert 0 <= max(tensor.maximum, 0.0) - high <= step


def test_fewer_bits_clip_more() -> None:
    tensor = seen(SAMPLES["normal"])
    ranges = [estimate(tensor, f"mse:{bits}") for bits in (2, 3, 4, 6, 8, 12, 16)]
    assert [low for low, _ in ranges] == sorted((low for low, _ in ranges), reverse=True)
    assert [high for _, high in ranges] == sorted(high for _, high in ranges)
    assert ranges[2][1] < ranges[4][1]
    # Banner et al. 2019, table 1: a normal distribution is best clipped at 2.55 and 3.92 standard deviations.
    symmetric = [estimate(tensor, f"mse:{bits}", INT8)[1] for bits in (4, 8)]
    # They spread 2^bits steps over the range, which here are two fewer: an eighth at 4 bits, most of it in the noise.
    assert symmetric == pytest.approx([2.55, 3.92], rel=0.04)


def test_the_format_gives_the_bits() -> None:
    tensor = seen(SAMPLES["laplace"])
    assert estimate(tensor, "mse") == estimate(tensor, "mse:8")
    assert estimate(tensor, "mse", QuantSpec("uint4")) == estimate(tensor, "mse:4")
    assert estimate(tensor, "mse", QuantSpec("int4", symmetric=True)) == estimate(tensor, "mse:4", INT8)
    assert estimate(tensor, "mse", QuantSpec("int8", symmetric=True, bits=7))[1] < estimate(tensor, "mse", INT8)[1]


@untimed
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.sampled_from([3, 15, 255]))
def test_mse_is_optimal_for_any_few_values(values: list[float], steps: int) -> None:
    tensor = coarse(np.array(values), 16)
    low, high = least_squares(points_of(tensor), steps, function_of("", tensor))
    mine = model_error(tensor, low, high, steps, "", high - low)
    lows, highs = borders(tensor)
    least = min(model_error(tensor, lo, hi, steps, "", hi - lo) for lo in lows for hi in highs)
    assert mine <= least * (1 + 1e-9) + 1e-12 * model_error(tensor, 0.0, 0.0, steps, "", 0.0)


# ---- looking through a function --------------------------------------------------------------------------------------


def test_what_lies_below_zero_is_free_behind_a_relu() -> None:
    tensor = seen(SAMPLES["normal"])
    low, high = estimate(tensor, "mse::relu")
    assert low == 0.0
    assert high > estimate(tensor, "mse")[1]
    assert estimate(tensor, "mse::clip(0,inf)") == (low, high)


def test_what_lies_beyond_its_bounds_is_free_behind_a_clip() -> None:
    tensor = seen(np.random.default_rng(0).uniform(-20, 20, 50_000))
    assert estimate(tensor, "mse::clip(-1.5,6)") == pytest.approx((-1.5, 6.0), abs=6 / 100)


@pytest.mark.parametrize(("name", "least"), [("silu", -12.0), ("gelu", -5.0), ("hard-swish", -3.1)])
def test_gates_clip_the_negative_side_for_free(name: str, least: float) -> None:
    values = np.random.default_rng(3).uniform(-20, 5, 100_000)
    tensor = seen(values)
    low, high = estimate(tensor, f"mse:8:{name}")
    assert least < low < -1
    assert high == pytest.approx(tensor.maximum, abs=25 / 255)
    function = THROUGH[name]

    def error(lo: float, hi: float) -> float:
        scale = (hi - lo) / 255
        stored = np.clip(np.round((values - lo) / scale), 0, 255) * scale + lo
        return float(np.square(function(stored) - function(values)).mean())

    assert error(low, high) < 0.5 * error(tensor.minimum, tensor.maximum)


def test_a_softmax_forgives_what_is_far_below_the_largest_scores() -> None:
    random = np.random.default_rng(5)
    rows = random.standard_normal((500, 64)) - 30 * (random.random((500, 64)) < 0.5)
    rows[:, 0] = random.uniform(3, 6, 500)
    tensor = seen(rows)
    low, high = estimate(tensor, "mse::softmax")
    assert -12 < low < -1
    assert high > 5.5

    def error(lo: float, hi: float) -> float:
        scale = (hi - lo) / 255
        stored = np.clip(np.round(rows / scale), np.round(lo / scale), np.round(hi / scale)) * scale
        exact, rounded = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (rows, stored))
        return float(np.square(exact - rounded).mean())

    assert error(low, high) < 0.3 * error(*estimate(tensor, "mse"))


def test_a_softmax_keeps_scores_where_every_row_is_low() -> None:
    tensor = seen(np.random.default_rng(5).uniform(-90, -60, (50, 64)))
    low, high = estimate(tensor, "mse::softmax")
    assert low < -65
    assert high == 0.0


# ---- sqnr ------------------------------------------------------------------------------------------------------------


def noise(tensor: TensorStatistics, scale: float, offset: float, steps: int, gamma: float) -> float:
    """Return AIMET's noise of one candidate, bin after bin."""
    points, total = points_of(tensor), 0.0
    for value, count in zip(points.values.tolist(), points.weights.tolist(), strict=True):
        stored = float(np.rint(value / scale - offset))
        kept = min(max(stored, 0.0), float(steps))
        weight = 1.0 if kept == stored else gamma
        total += weight * count * ((kept + offset) * scale - value) ** 2
    return total


@pytest.mark.parametrize("spec", [QuantSpec("uint8"), INT8, QuantSpec("uint4"), QuantSpec("int4", symmetric=True)])
@pytest.mark.parametrize("name", SAMPLES)
def test_sqnr_is_the_best_of_its_grid(name: str, spec: QuantSpec) -> None:
    tensor = coarse(SAMPLES[name], 128)
    steps = spec.limits[1] - spec.limits[0]
    grid = SqnrGrid(scales=7, offsets=6, symmetric_scales=21)
    points = points_of(tensor)
    scales, offsets = sqnr_candidates(points, spec, grid)
    errors = [noise(tensor, s, o, steps, 3.0) for s, o in zip(scales.tolist(), offsets.tolist(), strict=True)]
    low, high = best_sqnr(points, spec, function_of("", tensor), grid)
    best = int(np.argmin(errors))
    if spec.symmetric:
        reach = scales[best] * spec.limits[1]
        assert (low, high) == pytest.approx((max(points.minimum, -reach), min(points.maximum, reach)), rel=1e-12)
    else:
        wanted = scales[best] * offsets[best], scales[best] * (offsets[best] + steps)
        assert (low, high) == pytest.approx((max(points.minimum, wanted[0]), min(points.maximum, wanted[1])), rel=1e-12)


def test_a_heavier_weight_of_clipping_clips_less() -> None:
    tensor = seen(SAMPLES["laplace"])
    widths = [high - low for low, high in (estimate(tensor, f"sqnr:{gamma}") for gamma in (1, 3, 30, 1000))]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1]


@pytest.mark.parametrize("name", ["sqnr", "mse", "entropy"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_search_gives_a_valid_quantization(name: str, sample: str) -> None:
    tensor = seen(SAMPLES[sample])
    for spec in (QuantSpec("uint8"), INT8, QuantSpec("int4", symmetric=True), QuantSpec("uint16")):
        params = affine_params(spec, *estimate(tensor, name, spec))
        reach = float(params.scale) * spec.limits[1]
        extremes = tensor.minimum, tensor.maximum, 0.0
        widest = max(map(abs, extremes)) if spec.symmetric else max(extremes) - min(extremes)
        assert 0 < reach <= widest * (1 + 1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_outlier_does_not_cut_off_the_side_that_fits_no_half_step(sign: float) -> None:
    """With outliers at 187 a step is 0.74; an end at -0.25 rounds to no step at all."""
    values = np.append(np.random.default_rng(0).standard_normal(40_000) * 0.4 + 0.1, [187.0] * 200) * sign
    tensor = TensorStatistics()
    tensor.add(values.astype(np.float32))
    points, function, step = points_of(tensor), function_of("", tensor), 187.0 / 254
    cut = (-0.25, 187.0) if sign > 0 else (-187.0, 0.25)

    def error(low: float, high: float) -> float:
        params = affine_params(QuantSpec("uint8"), low, high)
        scale, zero = float(params.scale), int(params.zero_point)
        integers = np.clip(np.rint(values / scale) + zero, 0, 255)
        return float(np.square((integers - zero) * scale - values).sum())

    kept = keep_short_side(points, 255, function, cut)
    assert kept == pytest.approx((-step, 187.0) if sign > 0 else (-187.0, step))
    assert error(*kept) < 0.8 * error(*cut)
    assert keep_short_side(points, 255, function, (-2.0, 187.0)) == (-2.0, 187.0)
    assert error(*estimate(tensor, "mse")) <= error(*kept) * 1.02

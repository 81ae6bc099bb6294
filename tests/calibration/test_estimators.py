"""Range estimators on distributions whose answer is known."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.calibration.estimators import estimate, least_squares, moving_average, percentile
from qcompiler.calibration.statistics import HALF_BINS, TensorStatistics
from qcompiler.errors import CalibrationError

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def seen(*feeds: np.ndarray) -> TensorStatistics:
    made = TensorStatistics()
    for feed in feeds:
        made.add(np.asarray(feed, np.float32))
    return made


def squared_error(values: np.ndarray, low: float, high: float, bits: int = 8) -> float:
    """Return the mean squared error of affine quantization over a range, to nearest, with an exact zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    steps = 2**bits - 1
    scale = (high - low) / steps
    zero = np.rint(-low / scale)
    stored = np.clip(np.rint(values / scale) + zero, 0, steps)
    return float(np.square((stored - zero) * scale - values).mean())


RANDOM = np.random.default_rng(1)
SAMPLES = {
    "normal": RANDOM.standard_normal(100_000),
    "laplace": RANDOM.laplace(size=100_000),
    "relu": np.maximum(RANDOM.standard_normal(100_000), 0),
    "uniform": RANDOM.uniform(-1, 3, 100_000),
    "outlier": np.append(RANDOM.standard_normal(100_000), [60.0]),
    "negative": -np.abs(RANDOM.laplace(size=100_000)),
}


RAMP = np.linspace(-1, 1, 20001)


def test_min_max_is_exact() -> None:
    assert estimate(seen([3, -0.1], [7, 2]), "min-max") == (float(np.float32(-0.1)), 7.0)


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 99.9])
def test_a_percentile_of_a_ramp_cuts_both_ends_alike(percent: float) -> None:
    tensor = seen(RAMP)
    low, high = percentile(tensor, percent)
    wanted = 2 * percent / 100 - 1
    assert high == pytest.approx(wanted, abs=2 * tensor.width)
    assert low == pytest.approx(-wanted, abs=2 * tensor.width)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_percentile_is_numpys_within_a_bin(name: str, percent: float) -> None:
    values = SAMPLES[name].astype(np.float32)
    tensor = seen(values)
    low, high = percentile(tensor, percent)
    assert abs(low - np.percentile(values, 100 - percent, method="lower")) <= tensor.width
    assert abs(high - np.percentile(values, percent, method="higher")) <= tensor.width


def test_a_whole_percentile_is_min_max() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    tensor = seen(values)
    assert percentile(tensor, 100.0) == estimate(tensor, "min-max")


def test_a_percentile_ignores_an_outlier() -> None:
    values = np.concatenate([RAMP, [50.0]])
    tensor = seen(values)
    low, high = estimate(tensor, "percentile:99.9")
    assert tensor.width == 64 / HALF_BINS
    assert high == pytest.approx(1.0, abs=2 * tensor.width)
    assert low == pytest.approx(-1.0, abs=2 * tensor.width)


@untimed
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), st.floats(50.5, 100))
def test_a_percentile_stays_within_the_extremes(values: list[float], percent: float) -> None:
    tensor = seen(np.array(values))
    low, high = percentile(tensor, percent)
    assert tensor.minimum <= low <= high <= tensor.maximum


@pytest.mark.parametrize("percent", [50.0, 0.0, -3.0, 100.5])
def test_a_percentile_out_of_bounds_is_an_error(percent: float) -> None:
    with pytest.raises(CalibrationError, match=rf"^a percentile lies in \(50, 100\], not {percent:g}$"):
        percentile(seen([1.0]), percent)


def test_moving_average_follows_the_feeds_in_order() -> None:
    tensor = seen([-1, 1], [-3, 5], [0, 2])
    low, high = moving_average(tensor, 0.5)
    assert low == ((-1 + -3) / 2 + 0) / 2
    assert high == ((1 + 5) / 2 + 2) / 2
    assert estimate(tensor, "moving-average:0.5") == (low, high)
    assert estimate(tensor, "moving-average") == moving_average(tensor, 0.01)


@pytest.mark.parametrize(("bits", "gain"), [(8, 1.02), (4, 2.0)])
@pytest.mark.parametrize("draw", ["laplace", "standard_t"])
def test_least_squares_beats_min_max_on_heavy_tails(draw: str, bits: int, gain: float) -> None:
    random = np.random.default_rng(7)
    values = random.laplace(size=50_000) if draw == "laplace" else random.standard_t(3, size=50_000)
    tensor = seen(values)
    low, high = least_squares(tensor, bits)
    assert tensor.minimum < low < 0 < high < tensor.maximum
    plain = squared_error(values, tensor.minimum, tensor.maximum, bits)
    assert gain * squared_error(values, low, high, bits) < plain


@pytest.mark.parametrize("name", SAMPLES)
def test_least_squares_is_close_to_the_brute_force_optimum(name: str) -> None:
    values = SAMPLES[name][-10_000:]
    lows = np.linspace(0, min(values.min(), 0), 41) if values.min() < 0 else [0.0]
    highs = np.linspace(0, max(values.max(), 0), 41) if values.max() > 0 else [0.0]
    best = min(squared_error(values, lo, hi) for lo in lows for hi in highs if hi > lo)
    # Neighbouring candidates of the search differ by 1/48 of the range, hence by about 4 % in scale squared.
    assert squared_error(values, *least_squares(seen(values))) <= 1.05 * best


def test_least_squares_beats_min_max_with_one_outlier() -> None:
    values = np.concatenate([np.random.default_rng(1).standard_normal(100_000), [60.0]])
    tensor = seen(values)
    low, high = least_squares(tensor)
    assert high < 60
    assert squared_error(values, low, high) < squared_error(values, tensor.minimum, tensor.maximum)


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (1.0, 0.5), (-1.0, 4.0)])
def test_least_squares_is_min_max_on_a_uniform_distribution(shift: float, stretch: float) -> None:
    values = (RAMP + shift) * stretch
    tensor = seen(values)
    low, high = least_squares(tensor)
    assert (low, high) == (min(tensor.minimum, 0.0), max(tensor.maximum, 0.0))


def test_fewer_bits_clip_more() -> None:
    tensor = seen(np.random.default_rng(2).standard_normal(100_000))
    four, eight = least_squares(tensor, 4), least_squares(tensor, 8)
    assert eight[0] < four[0] < 0 < four[1] < eight[1]


@pytest.mark.parametrize("name", ["min-max", "percentile", "mse", "moving-average"])
def test_constant_tensors(name: str) -> None:
    assert estimate(seen(np.zeros(5)), name) == (0.0, 0.0)
    assert estimate(seen(np.full(5, 2.5)), name)[1] == 2.5
    assert estimate(seen(np.full(5, -2.5)), name)[0] == -2.5


def test_looking_through_silu_clips_the_negative_side_for_free() -> None:
    values = np.random.default_rng(3).uniform(-20, 5, 100_000)
    tensor = seen(values)
    low, high = estimate(tensor, "mse:8:silu")
    assert -12 < low < -2  # silu(-12) is -7e-5
    assert high == tensor.maximum
    plain_low, _ = estimate(tensor, "mse:8")
    assert plain_low == tensor.minimum

    def behind(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def error(lo: float, hi: float) -> float:
        scale = (hi - lo) / 255
        stored = np.clip(np.round((values - lo) / scale), 0, 255) * scale + lo
        return float(np.square(behind(stored) - behind(values)).mean())

    assert error(low, high) < error(tensor.minimum, tensor.maximum)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("entropy", "unknown estimator 'entropy'; known: min-max, moving-average, percentile, mse"),
        ("percentile:lots", "estimator 'percentile:lots': 'lots' is not a number"),
        (
            "percentile:99:silu",
            "estimator 'percentile:99:silu': only mse looks through a function, one of silu, sigmoid",
        ),
        *(
            (f"mse:{n}", f"estimator 'mse:{n}': bits are a whole number from 2 to 16")
            for n in ("0", "-3", "inf", "8.5")
        ),
        ("mse:8:tanh", "estimator 'mse:8:tanh': only mse looks through a function, one of silu, sigmoid"),
    ],
)
def test_an_unknown_estimator_is_an_error(text: str, error: str) -> None:
    with pytest.raises(CalibrationError, match=f"^{re.escape(error)}$"):
        estimate(seen([1.0]), text)

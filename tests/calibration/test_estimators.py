"""Estimators that read extremes, ranks and moments, and the text that names any of them."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.calibration.estimators import ESTIMATORS, estimate, estimate_each, moving_average, percentile
from qcompiler.calibration.statistics import HALF_BINS
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec
from tests.calibration.estimator_samples import SAMPLES, seen

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""

RAMP = np.linspace(-1, 1, 20001)
SYMMETRIC = QuantSpec("int8", symmetric=True)
TEXTS = (*ESTIMATORS, "percentile:99", "mse::relu", "mse::softmax", "mse:4:gelu", "sqnr:1", "std:2", "mse::clip(-1,2)")


def test_min_max_is_exact() -> None:
    assert estimate(seen([3, -0.1], [7, 2]), "min-max") == (float(np.float32(-0.1)), 7.0)


@pytest.mark.parametrize("name", SAMPLES)
def test_min_max_is_numpys(name: str) -> None:
    values = SAMPLES[name].astype(np.float32)
    assert estimate(seen(values), "min-max") == (float(values.min()), float(values.max()))


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 99.9])
def test_a_percentile_of_a_ramp_cuts_both_ends_alike(percent: float) -> None:
    tensor = seen(RAMP)
    low, high = percentile(tensor, percent)
    wanted = 2 * percent / 100 - 1
    assert high == pytest.approx(wanted, abs=2 * tensor.width)
    assert low == pytest.approx(-wanted, abs=2 * tensor.width)


@pytest.mark.parametrize("percent", [99.0, 99.9, 99.99, 99.999, 100.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_percentile_is_numpys_within_a_bin(name: str, percent: float) -> None:
    values = SAMPLES[name].astype(np.float32)
    tensor = seen(*np.array_split(values, 3))
    low, high = percentile(tensor, percent)
    assert abs(low - np.percentile(values, 100 - percent, method="lower")) <= tensor.width
    assert abs(high - np.percentile(values, percent, method="higher")) <= tensor.width


def test_a_whole_percentile_is_min_max() -> None:
    tensor = seen(np.random.default_rng(0).standard_normal(1000))
    assert percentile(tensor, 100.0) == estimate(tensor, "min-max")


def test_a_percentile_ignores_an_outlier() -> None:
    tensor = seen(np.concatenate([RAMP, [50.0]]))
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


@untimed
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50),
    st.lists(st.floats(50.5, 100), min_size=2, max_size=2),
)
def test_a_larger_percentile_is_no_narrower(values: list[float], percents: list[float]) -> None:
    tensor = seen(np.array(values))
    narrow, wide = percentile(tensor, min(percents)), percentile(tensor, max(percents))
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


def test_moving_average_follows_the_feeds_in_order() -> None:
    tensor = seen([-1, 1], [-3, 5], [0, 2])
    low, high = moving_average(tensor, 0.5)
    assert low == ((-1 + -3) / 2 + 0) / 2
    assert high == ((1 + 5) / 2 + 2) / 2
    assert estimate(tensor, "moving-average:0.5") == (low, high)
    assert estimate(tensor, "moving-average") == moving_average(tensor, 0.01)
    assert estimate(tensor, "moving-average:1") == (0.0, 2.0)


def deviation_tolerance(values: np.ndarray) -> float:
    """Return how far a standard deviation may be off: statistics add up squares in blocks of float32 (2^-20)."""
    return float(np.square(values).mean() * 2.0**-20 / (2 * values.std()))


@pytest.mark.parametrize("sigmas", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("name", SAMPLES)
def test_std_is_numpys_mean_and_deviation_within_the_extremes(name: str, sigmas: float) -> None:
    values = SAMPLES[name].astype(np.float32)
    low, high = estimate(seen(values), f"std:{sigmas}")
    wide = values.astype(np.float64)
    tolerance = 1e-7 * float(np.abs(wide).mean()) + sigmas * deviation_tolerance(wide)
    assert low == pytest.approx(max(wide.min(), wide.mean() - sigmas * wide.std()), abs=tolerance)
    assert high == pytest.approx(min(wide.max(), wide.mean() + sigmas * wide.std()), abs=tolerance)


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn, 448.0),
        ("float8e4m3fnuz", ml_dtypes.float8_e4m3fnuz, 240.0),
        ("float8e5m2", ml_dtypes.float8_e5m2, 57344.0),
        ("float8e5m2fnuz", ml_dtypes.float8_e5m2fnuz, 57344.0),
    ],
)
def test_std_of_an_8_bit_float_spreads_as_the_format_does(name: str, dtype: type, largest: float) -> None:
    values = SAMPLES["normal"].astype(np.float32)
    low, high = estimate(seen(values), "std", QuantSpec(name))
    numbers = [float(np.array([code], np.uint8).view(dtype)[0]) for code in range(256)]
    spread = np.std([n for n in numbers if np.isfinite(n)])
    wide = values.astype(np.float64)
    assert high / largest == pytest.approx(wide.std() / spread, abs=deviation_tolerance(wide) / spread)
    assert low == -high


@pytest.mark.parametrize("name", ["entropy", "mse", "sqnr"])
def test_even_steps_are_no_model_of_an_8_bit_float(name: str) -> None:
    with pytest.raises(CalibrationError, match=f"^estimator {name} knows formats with even steps, not float8e4m3fn"):
        estimate(seen([1.0]), name, QuantSpec("float8e4m3fn"))


@pytest.mark.parametrize("spec", [None, SYMMETRIC])
@pytest.mark.parametrize("text", TEXTS)
def test_a_tensor_of_zeros_has_no_range(text: str, spec: QuantSpec | None) -> None:
    assert estimate(seen(np.zeros(5)), text, spec) == (0.0, 0.0)


@pytest.mark.parametrize("spec", [None, SYMMETRIC])
@pytest.mark.parametrize("text", [*ESTIMATORS, "percentile:99", "std:2"])
def test_a_constant_tensor_keeps_its_value(text: str, spec: QuantSpec | None) -> None:
    for value in (2.5, -2.5, 1e-3, 3e38):
        low, high = estimate(seen(np.full(5, value)), text, spec)
        kept = high if value > 0 else low
        # The grid of the SQNR search reaches 17/16 of the range, and comes back to it but for rounding.
        assert kept == pytest.approx(float(np.float32(value)), rel=1e-12)


@untimed
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30),
    st.sampled_from(TEXTS),
    st.sampled_from([None, SYMMETRIC, QuantSpec("int8", symmetric=True, narrow=True), QuantSpec("uint4")]),
)
def test_a_range_lies_inside_the_extremes_and_zero(values: list[float], text: str, spec: QuantSpec | None) -> None:
    tensor = seen(np.array(values, np.float32))
    low, high = estimate(tensor, text, spec)
    assert min(tensor.minimum, 0.0) <= low <= high <= max(tensor.maximum, 0.0)


def test_subnormal_numbers_have_a_range() -> None:
    values = np.array([-1e-45, 3e-40, 1e-39], np.float32)
    tensor = seen(values)
    for text in ESTIMATORS:
        low, high = estimate(tensor, text)
        assert float(values.min()) <= low <= high <= float(values.max())


def test_auto_without_a_graph_is_the_least_squared_error() -> None:
    tensor = seen(SAMPLES["laplace"])
    assert estimate(tensor, "auto") == estimate(tensor, "mse")
    assert estimate(tensor, "auto:percentile:99.9") == estimate(tensor, "percentile:99.9")


def test_each_of_several_tensors_is_estimated_by_itself() -> None:
    tensors = [seen(SAMPLES["normal"]), seen([0.0, 4.0]), seen([-2.0])]
    low, high = estimate_each(tensors, "min-max")
    assert low.tolist() == [tensors[0].minimum, 0.0, -2.0]
    assert high.tolist() == [tensors[0].maximum, 4.0, -2.0]
    low, high = estimate_each([], "mse")
    assert (low.shape, high.shape) == ((0,), (0,))


KNOWN = "min-max, moving-average, percentile, entropy, mse, sqnr, std, auto"
FUNCTIONS = "silu, sigmoid, relu, gelu, tanh, hard-sigmoid, hard-swish, softmax, clip(LOW,HIGH)"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("guess", f"unknown estimator 'guess'; known: {KNOWN}"),
        ("automatic", f"unknown estimator 'automatic'; known: {KNOWN}"),
        ("percentile:lots", "estimator 'percentile:lots': 'lots' is not a number"),
        ("percentile:50", "a percentile lies in (50, 100], not 50"),
        ("percentile:100.5", "a percentile lies in (50, 100], not 100.5"),
        ("percentile:nan", "a percentile lies in (50, 100], not nan"),
        ("percentile:99:silu", "estimator 'percentile:99:silu': only mse and sqnr look through a function"),
        *((f"mse:{n}", f"estimator mse:{n}: bits are a whole number from 2 to 16") for n in ("0", "-3", "inf", "8.5")),
        ("mse:8:sinh", f"unknown function 'sinh' to look through; known: {FUNCTIONS}"),
        ("mse::clip(a,1)", "'clip(a,1)': 'a' is not a number; write clip(LOW,HIGH), -inf and inf for none"),
        ("entropy:1", "entropy takes a whole number of levels from 2 up, not 1"),
        ("entropy:2.5", "entropy takes a whole number of levels from 2 up, not 2.5"),
        ("entropy:inf", "entropy takes a whole number of levels from 2 up, not inf"),
        ("sqnr:0", "sqnr takes a positive weight of clipping noise, not 0"),
        ("std:-1", "std takes a positive number of standard deviations, not -1"),
        ("moving-average:0", "a moving average takes a constant in (0, 1], not 0"),
    ],
)
def test_a_text_that_says_nothing_is_an_error(text: str, error: str) -> None:
    with pytest.raises(CalibrationError, match=f"^{re.escape(error)}$"):
        estimate(seen([1.0]), text)


@pytest.mark.parametrize("text", ESTIMATORS)
def test_a_tensor_without_a_finite_element_is_an_error(text: str) -> None:
    with pytest.raises(CalibrationError, match=r"the tensor has no finite element$"):
        estimate(seen(np.full(3, np.inf)), text)

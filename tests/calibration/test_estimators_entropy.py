"""Entropy calibration against a direct implementation of the published algorithm."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompiler.calibration.divergence import least_divergence
from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.histogram import points_of
from qcompiler.calibration.statistics import TensorStatistics
from qcompiler.quant.spec import QuantSpec
from tests.calibration.estimator_samples import SAMPLES, seen

INT8 = QuantSpec("int8", symmetric=True)


def direct(magnitudes: list[int], levels: int) -> list[float]:
    """Return KL(P || Q) for each candidate number of bins from ``levels`` on, as on the slides of GTC 2017."""
    found = []
    for i in range(levels, len(magnitudes) + 1):
        inside = magnitudes[:i]
        reference = [float(c) for c in inside]
        reference[-1] += sum(magnitudes[i:])
        candidate = [0.0] * i
        for group in range(levels):
            members = range(math.ceil(group * i / levels), math.ceil((group + 1) * i / levels))
            filled = [k for k in members if inside[k] > 0]
            for k in filled:
                candidate[k] = sum(inside[k] for k in members) / len(filled)
        p_sum, q_sum = sum(reference), sum(candidate)
        divergence = 0.0
        for p, q in zip(reference, candidate, strict=True):
            if p > 0:
                divergence += math.inf if q == 0 else p / p_sum * math.log((p / p_sum) / (q / q_sum))
        found.append(divergence)
    return found


def magnitudes_of(tensor: TensorStatistics) -> list[int]:
    """Return the histogram of |x| without the exact zeros, up to the last filled bin."""
    half = tensor.counts.size // 2
    counts = tensor.counts[half:] + tensor.counts[:half][::-1]
    counts[0] -= tensor.zeros
    last = int(np.flatnonzero(counts)[-1])
    return [int(c) for c in counts[: last + 1]]


def coarse(values: np.ndarray, bins: int) -> TensorStatistics:
    tensor = seen(values)
    tensor._fold_to(tensor.exponent + int(math.log2(tensor.counts.size / 2 / bins)))
    return tensor


@pytest.mark.parametrize("levels", [16, 64])
@pytest.mark.parametrize("name", [*SAMPLES, "student"])
def test_the_threshold_is_that_of_the_direct_implementation(name: str, levels: int) -> None:
    values = np.random.default_rng(4).standard_t(3, 20_000) if name == "student" else SAMPLES[name]
    tensor = coarse(values, 256)
    counts = magnitudes_of(tensor)
    divergences = direct(counts, levels)
    reach = least_divergence(points_of(tensor), levels)
    whole = reach == max(-tensor.minimum, tensor.maximum)
    chosen = len(divergences) - 1 if whole else math.ceil(reach / tensor.width) - levels
    # Equal divergences differ by rounding; whichever is taken, no candidate is better.
    assert divergences[chosen] == pytest.approx(min(divergences), rel=1e-9, abs=1e-12)


def test_the_full_histogram_agrees_as_well() -> None:
    tensor = seen(np.random.default_rng(4).standard_t(4, 50_000))
    counts = magnitudes_of(tensor)
    assert len(counts) > 1024
    divergences = direct(counts, 128)
    wanted = (128 + int(np.argmin(divergences))) * tensor.width
    low, high = estimate(tensor, "entropy")
    assert max(-low, high) == pytest.approx(wanted, abs=tensor.width)
    assert high < tensor.maximum


def test_one_side_is_used_where_there_is_one() -> None:
    values = np.abs(np.random.default_rng(4).standard_t(3, 50_000))
    low, high = estimate(seen(values), "entropy")
    assert low == 0.0
    assert 1 < high < values.max()
    assert estimate(seen(-values), "entropy") == (-high, 0.0)


def test_an_asymmetric_range_ends_where_the_shorter_side_does() -> None:
    values = np.append(np.random.default_rng(4).standard_t(3, 50_000), [])
    values = values[values > -1.0]
    tensor = seen(values)
    low, high = estimate(tensor, "entropy")
    assert low == tensor.minimum
    assert high < tensor.maximum
    assert estimate(tensor, "entropy", INT8) == (low, high)


def test_zeros_do_not_pull_the_threshold_down() -> None:
    values = np.random.default_rng(4).standard_t(4, 20_000)
    plain = estimate(seen(values), "entropy")
    assert estimate(seen(np.append(values, np.zeros(200_000))), "entropy") == plain


def test_few_filled_bins_are_kept_whole() -> None:
    tensor = coarse(np.linspace(-1, 1, 1001), 64)
    assert estimate(tensor, "entropy") == (-1.0, 1.0)
    assert estimate(tensor, "entropy:16")[1] <= 1.0


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.sampled_from([2, 3, 8]))
def test_any_small_histogram_agrees_with_the_direct_implementation(counts: list[int], levels: int) -> None:
    counts = [*counts, 1]
    values = np.repeat((np.arange(len(counts)) + 0.5) / 64, counts)
    tensor = coarse(values, 64)
    tensor = seen(values) if tensor.width > 1 / 64 else tensor
    tensor._fold_to(-6)
    assert magnitudes_of(tensor) == counts
    reach = least_divergence(points_of(tensor), levels)
    if len(counts) <= levels:
        assert reach == tensor.maximum
        return
    divergences = direct(counts, levels)
    chosen = math.ceil(reach / tensor.width) - levels
    assert divergences[chosen] == pytest.approx(min(divergences), rel=1e-9, abs=1e-9)

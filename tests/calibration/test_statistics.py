"""Streaming statistics: exact counts, and merging that gives what one pass would have given."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibration.statistics import HALF_BINS, Statistics, TensorStatistics
from qcompiler.errors import CalibrationError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
small = st.floats(-4, 4, width=32)
arrays = hnp.arrays(np.float32, st.integers(0, 40), elements=finite | small | st.just(0.0))

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


def seen(*feeds: np.ndarray, start: int = 0) -> TensorStatistics:
    made = TensorStatistics()
    for index, feed in enumerate(feeds, start):
        made.add(feed, index)
    return made


def exact(tensor: TensorStatistics) -> tuple[object, ...]:
    """Return what must not depend on how the elements were grouped."""
    return (
        tensor.count,
        tensor.minimum,
        tensor.maximum,
        tensor.zeros,
        tensor.exponent if tensor.count > tensor.zeros else None,
        tensor.counts.tolist(),
    )


def expected_counts(values: np.ndarray, width: float) -> np.ndarray:
    bins = np.floor(values.astype(np.longdouble).reshape(-1) / np.longdouble(width)).astype(np.int64) + HALF_BINS
    return np.bincount(bins, minlength=2 * HALF_BINS)


def test_an_empty_one_has_seen_nothing() -> None:
    tensor = seen(np.zeros((0, 4), np.float32))
    assert (tensor.count, tensor.zeros, tensor.mean_square, tensor.sums) == (0, 0, 0.0, [])


def test_figures_of_a_known_tensor() -> None:
    tensor = seen(np.float32([[0, -1.5, 3], [0, 0.5, 2]]))
    assert (tensor.count, tensor.zeros, tensor.minimum, tensor.maximum) == (6, 2, -1.5, 3.0)
    assert tensor.sums == [(4.0, 15.5, 6, -1.5, 3.0)]
    assert tensor.mean_square == pytest.approx(15.5 / 6, rel=1e-15)
    assert tensor.width == 4 / HALF_BINS  # the power of two that reaches beyond 3
    filled = {int(i) - HALF_BINS: int(tensor.counts[i]) for i in np.nonzero(tensor.counts)[0]}
    assert filled == {-HALF_BINS * 3 // 8: 1, 0: 2, HALF_BINS // 8: 1, HALF_BINS // 2: 1, HALF_BINS * 3 // 4: 1}


@pytest.mark.parametrize("reach", [1.0, 2.0**-30, 2.0**127])
def test_a_power_of_two_still_lies_inside(reach: float) -> None:
    tensor = seen(np.float32([reach, -reach]))
    assert tensor.width * HALF_BINS == 2 * reach
    assert int(tensor.counts.sum()) == 2


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_count_like_float32(dtype: type) -> None:
    values = np.arange(-8, 9).astype(dtype)
    assert exact(seen(values)) == exact(seen(values.astype(np.float32)))


@untimed
@given(hnp.arrays(np.float32, st.integers(1, 60), elements=finite))
def test_the_histogram_is_exact(values: np.ndarray) -> None:
    tensor = seen(values)
    np.testing.assert_array_equal(tensor.counts, expected_counts(values, tensor.width))
    assert (tensor.minimum, tensor.maximum) == (values.min(), values.max())
    assert tensor.zeros == np.count_nonzero(values == 0)


def test_the_histogram_is_exact_beyond_one_block() -> None:
    values = np.random.default_rng(3).standard_normal((7, 30011)).astype(np.float32)
    tensor = seen(values)
    np.testing.assert_array_equal(tensor.counts, expected_counts(values, tensor.width))
    total, square, count, low, high = tensor.sums[0]
    wide = values.astype(np.float64)
    assert (count, low, high) == (values.size, values.min(), values.max())
    # Sums of float64 in another order: n rounding errors of half an ulp of the sum of magnitudes at the very most.
    bound = values.size * np.finfo(np.float64).eps
    assert abs(total - wide.sum()) <= bound * np.abs(wide).sum()
    assert abs(square - np.square(wide).sum()) <= bound * np.square(wide).sum()


@untimed
@given(arrays, arrays)
def test_merging_commutes(one: np.ndarray, other: np.ndarray) -> None:
    assert exact(seen(one).merge(seen(other))) == exact(seen(other).merge(seen(one)))


@untimed
@given(arrays, arrays, arrays)
def test_merging_associates(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    one, two, three = (seen(feed, start=index) for index, feed in enumerate((a, b, c)))
    left, right, backwards = one.merge(two).merge(three), one.merge(two.merge(three)), three.merge(two).merge(one)
    assert exact(left) == exact(right) == exact(backwards)
    assert left.sums == right.sums == backwards.sums
    assert left.mean_square == right.mean_square == backwards.mean_square


@untimed
@given(st.lists(arrays, min_size=1, max_size=5))
def test_merging_equals_one_pass(feeds: list[np.ndarray]) -> None:
    merged = TensorStatistics()
    for index, feed in enumerate(feeds):
        merged = merged.merge(seen(feed, start=index))
    assert exact(merged) == exact(seen(*feeds)) == exact(seen(np.concatenate(feeds)))
    assert merged.sums == seen(*feeds).sums


@untimed
@given(st.lists(arrays, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_feeds_does_not_matter(feeds: list[np.ndarray], random: "object") -> None:
    shuffled = list(feeds)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert exact(seen(*feeds)) == exact(seen(*shuffled))


def test_the_mean_square_of_shards_does_not_depend_on_their_order() -> None:
    one, two, three = (seen(np.float32([value]), start=index) for index, value in enumerate((1e8, 1.0, 1.1)))
    assert one.merge(two).merge(three).mean_square == two.merge(three).merge(one).mean_square


def test_merging_leaves_both_as_they_were() -> None:
    one, other = seen(np.float32([1, 2])), seen(np.float32([100]))
    before = (exact(one), exact(other))
    one.merge(other)
    assert (exact(one), exact(other)) == before


def test_a_copy_is_independent() -> None:
    one = seen(np.float32([1, 2]))
    before = exact(one)
    one.copy().add(np.float32([5]))
    assert exact(one) == before


class TestStatistics:
    def sample(self) -> Statistics:
        tensors = {
            "a": seen(np.float32([1, -2, 0]), np.float32([0.1])),
            "b/é:0": seen(np.float32([1e-30, 3e38])),
            "never": TensorStatistics(),
        }
        return Statistics(tensors, 2)

    def test_save_and_load_give_the_same(self, tmp_path: Path) -> None:
        saved = self.sample()
        saved.save(tmp_path / "s.npz")
        loaded = Statistics.load(tmp_path / "s.npz")
        assert loaded.feeds == 2
        assert list(loaded) == list(saved)
        for name in saved:
            assert exact(loaded.tensors[name]) == exact(saved.tensors[name])
            assert loaded.tensors[name].sums == saved.tensors[name].sums
        assert loaded.range("a", "percentile:99") == saved.range("a", "percentile:99")

    def test_the_same_statistics_give_the_same_bytes(self, tmp_path: Path) -> None:
        self.sample().save(tmp_path / "one.npz")
        self.sample().save(tmp_path / "two.npz")
        assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()

    def test_what_is_no_statistics_file_is_an_error(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "other.npz", x=np.zeros(3))
        (tmp_path / "text.npz").write_text("no")
        (tmp_path / "empty.npz").write_bytes(b"")
        self.sample().save(tmp_path / "cut.npz")
        (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-30])
        for name in ("other.npz", "text.npz", "empty.npz", "cut.npz", "absent.npz"):
            with pytest.raises(CalibrationError, match=f"{name} is not a statistics file: "):
                Statistics.load(tmp_path / name)

    def test_another_version_is_an_error(self, tmp_path: Path) -> None:
        head = np.frombuffer(b'{"version": 99, "tensors": {}, "feeds": 0}', np.uint8)
        np.savez(tmp_path / "new.npz", head=head)
        with pytest.raises(CalibrationError, match=r"new\.npz: statistics of version 99; expected 1$"):
            Statistics.load(tmp_path / "new.npz")

    def test_answers_by_name(self) -> None:
        statistics = self.sample()
        assert [statistics.observed(n) for n in ("a", "never", "unknown")] == [True, False, False]
        assert statistics.range("a") == (-2.0, 1.0)
        assert statistics.elements_per_feed("a") == 2
        assert statistics.mean_square("a") == pytest.approx((5 + float(np.float32(0.1)) ** 2) / 4, rel=1e-15)

    @pytest.mark.parametrize("name", ["never", "unknown"])
    def test_a_range_of_what_was_not_observed_is_an_error(self, name: str) -> None:
        with pytest.raises(CalibrationError, match=f"^{name} was never executed during calibration$"):
            self.sample().range(name)

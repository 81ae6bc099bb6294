"""Streaming statistics: exact, and the same bit for bit however feeds were shared out and merged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qcompiler.calibration import recent_extremes, statistics
from qcompiler.calibration.statistics import HALF_BINS, ChannelExtremes, Statistics, TensorStatistics, merge_all
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError

F = np.float32
LARGEST = float(np.finfo(F).max)
TINIEST = 2.0**-149

untimed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
"""A busy machine is no failure."""

finite = (
    st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.floats(-4, 4, width=32)
    | st.sampled_from([0.0, -0.0, 1.0, TINIEST, -TINIEST, LARGEST, -LARGEST, 1e-40, -1e-40])
)
anything = finite | st.sampled_from([math.nan, math.inf, -math.inf])
CHANNELS = 3
shapes = st.sampled_from([(0, CHANNELS), (1, CHANNELS), (4, CHANNELS), (2, 2, CHANNELS)])
tensors = hnp.arrays(F, shapes, elements=anything)
tensors_finite = hnp.arrays(F, st.integers(0, 40), elements=finite)


@dataclass(frozen=True)
class Execution:
    """One execution of one tensor."""

    values: Array
    axis: int | None
    squares: bool


executions = st.builds(Execution, tensors, st.sampled_from([-1, -1, -1, None]), st.sampled_from([True, True, False]))
half_executions = st.builds(
    lambda e, dtype: Execution(np.clip(e.values, -6e4, 6e4).astype(dtype), e.axis, e.squares),
    executions,
    st.sampled_from([np.float16, ml_dtypes.bfloat16]),
)
Run = list[dict[str, list[Execution]]]
"""For each feed, the executions of the tensors that it reached."""
runs: st.SearchStrategy[Run] = st.lists(
    st.dictionaries(st.sampled_from("ab"), st.lists(executions | half_executions, max_size=3)), max_size=7
)


def shard(run: Run, indices: Sequence[int]) -> Statistics:
    made = Statistics()
    for index in indices:
        for name, all_of_feed in run[index].items():
            tensor = made.tensors.setdefault(name, TensorStatistics())
            for execution in all_of_feed:
                tensor.add(execution.values, index, execution.axis, execution.squares)
        made.feeds += 1
    return made


def frozen(tensor: TensorStatistics) -> tuple[object, object]:
    """Return everything that a tensor's statistics hold, in a form that tells 0.0 from -0.0."""
    fields, arrays = tensor.state()
    return (
        {name: repr(value) for name, value in fields.items()},
        {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in arrays.items()},
    )


def frozen_all(of: Statistics) -> dict[str, object]:
    return {"feeds": of.feeds, **{name: frozen(of.tensors[name]) for name in sorted(of) if of.tensors[name].count}}


def seen(*feeds: Array, start: int = 0, axis: int | None = None) -> TensorStatistics:
    made = TensorStatistics()
    for index, feed in enumerate(feeds, start):
        made.add(feed, index, axis)
    return made


def expected_counts(values: Array, width: float) -> Array:
    # Fractions: a quotient of floats may round up to the next bin, or underflow to zero.
    found = [math.floor(Fraction(float(v)) / Fraction(width)) + HALF_BINS for v in values.reshape(-1)]
    return np.bincount(np.array(found, np.int64), minlength=2 * HALF_BINS)


class TestMerging:
    @untimed
    @given(runs, st.data())
    def test_any_shards_in_any_order_give_the_same_bits(self, run: Run, data: st.DataObject) -> None:
        owners = data.draw(st.lists(st.integers(0, 3), min_size=len(run), max_size=len(run)))
        shards = [shard(run, [i for i, o in enumerate(owners) if o == owner]) for owner in range(4)]
        while len(shards) > 1:
            one = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
            other = shards.pop(data.draw(st.integers(0, len(shards) - 1)))
            shards.append(one.merge(other))
        assert frozen_all(shards[0]) == frozen_all(shard(run, range(len(run))))

    @untimed
    @given(runs, st.integers(1, 3), st.data())
    def test_that_holds_beyond_the_window_of_recent_feeds(self, run: Run, window: int, data: st.DataObject) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recent_extremes, "RECENT", window)
            owners = data.draw(st.lists(st.integers(0, 2), min_size=len(run), max_size=len(run)))
            shards = [shard(run, [i for i, o in enumerate(owners) if o == owner]) for owner in range(3)]
            order = data.draw(st.permutations(shards))
            whole = shard(run, range(len(run)))
            assert frozen_all(merge_all(order)) == frozen_all(whole)
            for tensor in whole.tensors.values():
                assert len(tensor.extremes) == min(window, tensor.executions)

    @untimed
    @given(runs)
    def test_merging_commutes(self, run: Run) -> None:
        half = len(run) // 2
        one, other = shard(run, range(half)), shard(run, range(half, len(run)))
        before = frozen_all(one), frozen_all(other)
        assert frozen_all(one.merge(other)) == frozen_all(other.merge(one))
        assert (frozen_all(one), frozen_all(other)) == before

    @untimed
    @given(runs, st.integers(1, 3))
    def test_taking_in_equals_merging_and_uses_the_other_up(self, run: Run, shards: int) -> None:
        parts = [shard(run, range(s, len(run), shards)) for s in range(shards)]
        wanted = merge_all(parts)
        made = Statistics()
        for part in parts:
            made.take_in(part)
            assert part.tensors == {}
        assert frozen_all(made) == frozen_all(wanted)

    @untimed
    @given(tensors_finite, tensors_finite)
    def test_the_histogram_does_not_depend_on_how_elements_were_grouped(self, one: Array, other: Array) -> None:
        both, merged = seen(np.concatenate([one, other])), seen(one).merge(seen(other, start=1))
        assert (both.count, both.zeros, both.exponent) == (merged.count, merged.zeros, merged.exponent)
        assert (both.minimum, both.maximum) == (merged.minimum, merged.maximum)
        np.testing.assert_array_equal(both.counts, merged.counts)

    def test_the_mean_square_of_shards_does_not_depend_on_their_order(self) -> None:
        # Doubles would give 1e16 + 1 + 1.21 in three ways.
        one, two, three = (seen(F([value]), start=index) for index, value in enumerate((1e8, 1.0, 1.1)))
        left, right = one.merge(two).merge(three), two.merge(three).merge(one)
        wanted = sum((Fraction(float(F(v) * F(v))) for v in (1e8, 1.0, 1.1)), Fraction()) / 3
        assert left.mean_square == right.mean_square == pytest.approx(float(wanted), rel=2**-52)

    def test_negative_zero_leaves_no_trace_of_the_order(self) -> None:
        one, other = F([[0.0, -0.0, 2.0]]), F([[-0.0, 0.0, 1.0]])
        both = [seen(a, axis=1).merge(seen(b, start=1, axis=1)) for a, b in ((one, other), (other, one))]
        assert frozen(both[0])[0] == frozen(both[1])[0]
        assert repr(both[0].minimum) == "0.0"
        swapped = seen(one, axis=1).merge(seen(other, start=1, axis=1))
        assert frozen(swapped) == frozen(seen(other, start=1, axis=1).merge(seen(one, axis=1)))

    def test_a_copy_is_independent(self) -> None:
        one = seen(F([[1, 2]]), axis=1)
        before = frozen(one)
        one.copy().add(F([[5, -7]]), 1, 1)
        merged = one.merge(TensorStatistics())
        merged.add(F([[9, 9]]), 3, 1)
        assert frozen(one) == before

    def test_channels_that_changed_are_gone_for_good_in_any_order(self) -> None:
        three, two = seen(F([[1, 2, 3]]), axis=1), seen(F([[4, 5]]), start=1, axis=1)
        again = seen(F([[6, 7, 8]]), start=2, axis=1)
        for merged in (three.merge(two).merge(again), again.merge(three).merge(two), two.merge(again.merge(three))):
            assert merged.channels is None
            assert merged.maximum == 8.0
        kept = three.merge(again).channels
        assert kept is not None
        assert (kept.low.tolist(), kept.high.tolist(), kept.count) == ([1, 2, 3], [6, 7, 8], 2)


class TestHistogram:
    @untimed
    @given(hnp.arrays(F, st.integers(1, 60), elements=finite))
    def test_it_is_exact(self, values: Array) -> None:
        tensor = seen(values)
        np.testing.assert_array_equal(tensor.counts, expected_counts(values, tensor.width))
        assert (tensor.minimum, tensor.maximum) == (values.min(), values.max())
        assert tensor.zeros == np.count_nonzero(values == 0)

    @untimed
    @given(st.lists(hnp.arrays(F, st.integers(0, 20), elements=finite), min_size=1, max_size=5))
    def test_it_is_exact_after_widening_and_merging(self, feeds: list[Array]) -> None:
        values = np.concatenate(feeds)
        for tensor in (seen(*feeds), merge_tensors([seen(f, start=i) for i, f in enumerate(feeds)])):
            np.testing.assert_array_equal(tensor.counts, expected_counts(values, tensor.width))

    @pytest.mark.parametrize("spread", [1e-30, 1.0, 1e30])
    def test_it_equals_numpy_on_the_same_borders_beyond_one_block(self, spread: float) -> None:
        values = np.random.default_rng(3).standard_normal((7, 30011)).astype(F) * F(spread)
        tensor = seen(values)
        borders = (np.arange(2 * HALF_BINS + 1) - HALF_BINS) * tensor.width
        wanted, _ = np.histogram(values.astype(np.float64), bins=borders)
        np.testing.assert_array_equal(tensor.counts, wanted)
        assert np.count_nonzero(wanted) > HALF_BINS // 2  # the reach is at most twice the largest value

    @pytest.mark.parametrize("reach", [1.0, 2.0**-30, 2.0**127])
    def test_a_power_of_two_still_lies_inside(self, reach: float) -> None:
        tensor = seen(F([reach, -reach]))
        assert tensor.width * HALF_BINS == 2 * reach
        assert int(tensor.counts.sum()) == 2

    @pytest.mark.parametrize("value", [LARGEST, -LARGEST, TINIEST, -TINIEST, 2.0**-126])
    def test_the_ends_of_the_number_range_lie_inside(self, value: float) -> None:
        tensor = seen(F([value]))
        assert int(tensor.counts.sum()) == 1
        assert bool(tensor.counts[:HALF_BINS].any()) == (value < 0)
        assert tensor.minimum == tensor.maximum == value


def merge_tensors(parts: Sequence[TensorStatistics]) -> TensorStatistics:
    merged = TensorStatistics()
    for part in parts:
        merged = merged.merge(part)
    return merged


class TestFigures:
    def test_an_empty_one_has_seen_nothing(self) -> None:
        tensor = seen(np.zeros((0, 4), F))
        assert (tensor.count, tensor.zeros, tensor.mean, tensor.mean_square, tensor.std) == (0, 0, 0.0, 0.0, 0.0)
        assert tensor.extremes.shape == (0, 2)

    def test_a_known_tensor(self) -> None:
        tensor = seen(F([[0, -1.5, 3], [0, 0.5, 2]]))
        assert (tensor.count, tensor.zeros, tensor.minimum, tensor.maximum) == (6, 2, -1.5, 3.0)
        assert tensor.mean == 4 / 6
        assert tensor.mean_square == 15.5 / 6
        assert tensor.extremes.tolist() == [[-1.5, 3.0]]
        assert tensor.width == 4 / HALF_BINS  # the power of two that reaches beyond 3
        filled = {int(i) - HALF_BINS: int(tensor.counts[i]) for i in np.nonzero(tensor.counts)[0]}
        assert filled == {-HALF_BINS * 3 // 8: 1, 0: 2, HALF_BINS // 8: 1, HALF_BINS // 2: 1, HALF_BINS * 3 // 4: 1}

    def test_moments_against_numpy(self) -> None:
        feeds = [np.random.default_rng(i).standard_normal((5, 9001)).astype(F) * 3 + 1 for i in range(3)]
        tensor, wide = seen(*feeds), np.concatenate(feeds).astype(np.float64)
        # Blocks of 2^15 are summed pairwise in float32: an ulp of float32 per level of the tree at the most.
        bound = 16 * 2.0**-24
        assert tensor.mean == pytest.approx(wide.mean(), abs=bound * np.abs(wide).mean())
        assert tensor.mean_square == pytest.approx(np.square(wide).mean(), rel=bound)
        assert tensor.std == pytest.approx(wide.std(), rel=2 * bound)

    @pytest.mark.parametrize("scale", [3e38, 1e-40])
    def test_moments_of_numbers_whose_squares_leave_float32(self, scale: float) -> None:
        values = F([1, -1, 0.5]) * F(scale)
        tensor, wide = seen(values), values.astype(np.float64)
        assert tensor.mean_square == pytest.approx(np.square(wide).mean(), rel=2.0**-50 if scale > 1 else 1.0)
        assert tensor.mean == pytest.approx(wide.mean(), rel=2.0**-20)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
    def test_other_float_types_count_like_float32(self, dtype: type) -> None:
        values = np.arange(-8, 9).astype(dtype).reshape(1, 17)
        assert frozen(seen(values, axis=1)) == frozen(seen(values.astype(F), axis=1))

    @untimed
    @given(st.lists(tensors, max_size=4))
    def test_what_is_not_finite_is_counted_apart(self, feeds: list[Array]) -> None:
        tensor = seen(*feeds)
        flat = np.concatenate([f.reshape(-1) for f in feeds]) if feeds else np.zeros(0, F)
        good = flat[np.isfinite(flat)]
        assert (tensor.nans, tensor.infinities) == (np.isnan(flat).sum(), np.isinf(flat).sum())
        assert tensor.count == good.size == tensor.counts.sum()
        assert tensor.zeros == np.count_nonzero(good == 0)
        assert (tensor.minimum, tensor.maximum) == (good.min(initial=np.inf), good.max(initial=-np.inf))
        some = [f[np.isfinite(f)] for f in feeds]
        assert tensor.extremes.tolist() == [[float(f.min()), float(f.max())] for f in some if f.size]
        assert tensor.executions == sum(f.size > 0 for f in some)

    @untimed
    @given(hnp.arrays(F, st.tuples(st.integers(1, 4), st.just(CHANNELS), st.integers(1, 3)), elements=anything))
    def test_channels_against_numpy(self, values: Array) -> None:
        tensor = TensorStatistics()
        tensor.add(values, 0, 1, squares=True)
        good = np.where(np.isfinite(values), values, np.nan).astype(np.float64).swapaxes(0, 1).reshape(CHANNELS, -1)
        if not np.isfinite(good).any():
            assert tensor.channels is None
            return
        found = tensor.channels
        assert found is not None
        assert found.axis == -2
        assert found.low.tolist() == [np.min(c[~np.isnan(c)], initial=np.inf) for c in good]
        assert found.high.tolist() == [np.max(c[~np.isnan(c)], initial=-np.inf) for c in good]
        squares = found.mean_square
        assert squares is not None
        wanted = np.nansum(np.square(good), axis=1) / good.shape[1]
        np.testing.assert_allclose(squares, wanted, rtol=2.0**-48)

    def test_reach_of_channels(self) -> None:
        extremes = ChannelExtremes(-1, F([-3, 1]), F([2, 4]))
        assert extremes.reach.tolist() == [3, 4]
        assert extremes.mean_square is None

    def test_executions_in_one_feed_are_one_row_of_extremes(self) -> None:
        tensor = TensorStatistics()
        for values in ([1.0, 2.0], [-4.0], [3.0]):
            tensor.add(F(values), 7)
        tensor.add(F([0.5]), 9)
        assert tensor.extremes.tolist() == [[-4.0, 3.0], [0.5, 0.5]]
        assert tensor.recent.feeds.tolist() == [7, 9]
        assert (tensor.executions, tensor.count) == (2, 5)

    def test_feeds_without_a_number_follow_each_other(self) -> None:
        tensor = TensorStatistics()
        for value in (1.0, 2.0, 3.0):
            tensor.add(F([value]))
        assert tensor.recent.feeds.tolist() == [0, 1, 2]

    def test_early_extremes_are_kept_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recent_extremes, "RECENT", 3)
        tensor = seen(*(F([i, -i]) for i in (5, 1, 9, 2, 3, 4)))
        assert tensor.extremes.tolist() == [[-2, 2], [-3, 3], [-4, 4]]
        assert tensor.recent.earlier == (-9.0, 9.0)
        assert (tensor.minimum, tensor.maximum, tensor.executions) == (-9.0, 9.0, 6)


class TestState:
    @untimed
    @given(st.lists(executions, max_size=4))
    def test_what_is_restored_equals_what_was_given_out_and_goes_on_alike(self, given_all: list[Execution]) -> None:
        tensor = TensorStatistics()
        for index, execution in enumerate(given_all):
            tensor.add(execution.values, index, execution.axis, execution.squares)
        fields, arrays = tensor.state()
        again = TensorStatistics.restored(dict(fields), {n: a.copy() for n, a in arrays.items()})
        assert frozen(again) == frozen(tensor)
        for one in (tensor, again):
            one.add(F([[1, 2, 3]]), 9, -1, squares=True)
        assert frozen(again) == frozen(tensor)

    def parts(self) -> tuple[dict[str, Any], dict[str, Array]]:
        fields, arrays = seen(F([[1, -2, 0]]), axis=1).state()
        return dict(fields), dict(arrays)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda f, a: f.pop("zeros"), "statistics lack a field: 'zeros'"),
            (lambda f, a: a.pop("moments"), "statistics lack a field: 'moments'"),
            (lambda f, a: a.pop("channel_high"), "statistics lack a field: 'channel_high'"),
            (lambda f, a: f.update(earlier=None), "statistics lack a field"),
            (lambda f, a: a.update(counts=np.zeros(8, np.int64)), "a histogram of 8 bins; expected 4096"),
        ],
    )
    def test_what_is_incomplete_is_an_error(self, change: Callable[[Any, Any], object], text: str) -> None:
        fields, arrays = self.parts()
        change(fields, arrays)
        with pytest.raises(CalibrationError, match=text):
            TensorStatistics.restored(fields, arrays)


class TestStatistics:
    def sample(self) -> Statistics:
        given_tensors = {
            "a": seen(F([1, -2, 0]), F([0.1])),
            "b/é:0": seen(F([1e-30, 3e38])),
            "never": TensorStatistics(),
        }
        return Statistics(given_tensors, 2)

    def test_answers_by_name(self) -> None:
        of = self.sample()
        assert [of.observed(n) for n in ("a", "never", "unknown")] == [True, False, False]
        assert of.range("a") == (-2.0, 1.0)
        assert of.elements_per_feed("a") == 2
        # 0.1 squared is rounded to float32, the sum of a feed of few elements being taken in it.
        assert of.mean_square("a") == pytest.approx((5 + 0.01) / 4, rel=2.0**-22)
        assert list(of) == ["a", "b/é:0", "never"]

    @pytest.mark.parametrize("name", ["never", "unknown"])
    def test_a_range_of_what_was_not_observed_is_an_error(self, name: str) -> None:
        with pytest.raises(CalibrationError, match=f"^{name} was never executed during calibration$"):
            self.sample().range(name)

    def test_an_unknown_estimator_is_an_error(self) -> None:
        with pytest.raises(CalibrationError, match="no-such"):
            self.sample().range("a", "no-such")

    def test_ranges_are_asked_for_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        of = self.sample()
        first = of.range("a", "percentile:99")
        monkeypatch.setattr(statistics, "estimate", None)
        assert of.range("a", "percentile:99") == first

    def test_merging_adds_feeds_and_names(self) -> None:
        one, other = Statistics({"a": seen(F([1]))}, 1, {"graph": "g"}), Statistics({"b": seen(F([2]), start=1)}, 2)
        both = one.merge(other)
        assert (both.feeds, list(both), both.about) == (3, ["a", "b"], {"graph": "g"})
        assert both.range("b") == (2.0, 2.0)

    def test_merging_nothing_gives_nothing(self) -> None:
        assert (merge_all([]).feeds, merge_all([]).tensors) == (0, {})

    def test_taking_in_forgets_ranges_that_were_asked_for(self) -> None:
        of = self.sample()
        assert of.range("a") == (-2.0, 1.0)
        of.take_in(Statistics({"a": seen(F([5]), start=2)}, 1))
        assert (of.range("a"), of.feeds) == ((-2.0, 5.0), 3)

    def test_a_sketch_is_made_at_the_first_call(self) -> None:
        of = Statistics()
        of.sketch("a").add(F([1]), 0)
        of.sketch("a").add(F([2]), 1)
        assert of.range("a") == (1.0, 2.0)


class TestMovement:
    def of(self, reaches: Sequence[float], **others: TensorStatistics) -> Statistics:
        return Statistics({"x": seen(*(F([-r, r]) for r in reaches)), **others}, len(reaches))

    def test_a_range_that_was_known_before_has_not_moved(self) -> None:
        assert self.of([5, *[1] * 19]).movement() == {"x": 0.0}

    def test_growth_is_relative_to_the_final_width(self) -> None:
        # Twenty feeds: the last tenth are two.
        assert self.of([*[3] * 18, 4, 2]).movement() == {"x": 0.25}
        assert self.of([*[3] * 17, 4, 4, 2]).movement() == {"x": 0.0}
        assert self.of([*[3] * 17, 4, 4, 2]).movement(share=0.5) == {"x": 0.25}

    def test_what_was_first_seen_last_has_grown_from_nothing(self) -> None:
        late = TensorStatistics()
        late.add(F([-1, 1]), 19)
        assert self.of([1] * 20, late=late).movement() == {"x": 0.0, "late": 1.0}

    def test_constants_and_the_unseen_are_left_out(self) -> None:
        still = seen(F([2, 2]))
        assert self.of([1] * 4, still=still, never=TensorStatistics()).movement() == {"x": 0.0}

    def test_extremes_before_the_window_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recent_extremes, "RECENT", 3)
        assert self.of([8, *[1] * 19]).movement() == {"x": 0.0}
        assert self.of([6, *[1] * 18, 8]).movement() == {"x": 0.25}

"""Exact sums: equal to sums of fractions, in any order and however the terms were shared out."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.calibration import exact
from qcompiler.calibration.exact import LIMBS, ExactSums

MOST = 2.0**299
terms = (
    st.floats(-MOST, MOST)
    | st.floats(-4, 4)
    | st.floats(width=32, allow_nan=False, allow_infinity=False).map(lambda x: x * x)
    | st.builds(lambda s, e: s * 2.0**e, st.sampled_from([-1.0, 1.0]), st.integers(-352, 299))
)
rows = st.lists(st.tuples(terms, terms), max_size=12)

untimed = settings(deadline=None)


def sums_of(given_rows: list[tuple[float, float]]) -> ExactSums:
    made = ExactSums(2)
    for row in given_rows:
        made.add(np.array(row))
    return made


def cut(term: float) -> Fraction:
    """Return a term less what it has below 2^-352, towards zero."""
    whole = Fraction(term) * 2**352
    return Fraction(int(whole), 2**352)


def as_float(whole: Fraction) -> float:
    return whole.numerator / whole.denominator  # a division of integers rounds once, to even


@untimed
@given(rows)
def test_sums_are_those_of_fractions_rounded_once(given_rows: list[tuple[float, float]]) -> None:
    expected = [as_float(sum((cut(row[i]) for row in given_rows), Fraction())) for i in (0, 1)]
    assert sums_of(given_rows).values().tolist() == expected


@untimed
@given(rows, st.randoms(use_true_random=False), st.lists(st.integers(0, 12), max_size=4))
def test_neither_order_nor_shards_change_a_limb(
    given_rows: list[tuple[float, float]], random: object, borders: list[int]
) -> None:
    whole = sums_of(given_rows)
    shuffled = list(given_rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cuts = [0, *sorted(min(b, len(shuffled)) for b in borders), len(shuffled)]
    merged = ExactSums(2)
    for start, stop in pairwise(cuts):
        merged = sums_of(shuffled[start:stop]).merged(merged)
    np.testing.assert_array_equal(merged.canonical(), whole.canonical())


@pytest.mark.parametrize("term", [2.0**-298, 2.0**-299, 3 * 2.0**-351, 2.0**-352, 2.0**299, 1 + 2.0**-52])
def test_terms_at_the_edges_come_back(term: float) -> None:
    for sign in (1, -1):
        assert sums_of([(sign * term, 0.0)]).values().tolist() == [sign * term, 0.0]


def test_what_lies_below_the_lowest_bit_is_cut_off_and_the_rest_is_kept() -> None:
    found = sums_of([(2.0**-310 + 2.0**-360, -(2.0**-310) - 2.0**-360), (2.0**-353, 5e-324)])
    assert found.values().tolist() == [2.0**-310, -(2.0**-310)]


def test_large_terms_that_cancel_leave_the_small_one() -> None:
    assert sums_of([(MOST, 1e-40), (1e-300 * 1e220, -1.0), (-MOST, 1.0)]).values()[0] == 1e-300 * 1e220


def test_a_carry_in_the_middle_of_adding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [(float(x), -(float(x) ** 2)) for x in np.random.default_rng(0).standard_normal(50) * 1e9]
    whole = sums_of(some).canonical().copy()
    monkeypatch.setattr(exact, "_CARRY_AFTER", 3)
    np.testing.assert_array_equal(sums_of(some).canonical(), whole)


def test_each_place_is_a_sum_of_its_own() -> None:
    sums = ExactSums(5)
    for i in range(4):
        sums.add(np.arange(5.0) * 10.0**i)
    assert sums.values().tolist() == [0.0, 1111.0, 2222.0, 3333.0, 4444.0]
    assert sums.limbs.shape == (5, LIMBS)
    assert ExactSums(0).values().shape == (0,)


@untimed
@given(rows)
def test_few_sums_are_those_of_many(given_rows: list[tuple[float, float]]) -> None:
    few, many = sums_of(given_rows), ExactSums(6)
    for row in given_rows:
        many.add(np.array([*row, *row, *row]))
    np.testing.assert_array_equal(np.tile(few.canonical(), (3, 1)), many.canonical())


@untimed
@given(rows, rows, st.sampled_from([1, 2, 3, 1 << 28]))
def test_taking_in_equals_adding(one: list[tuple[float, float]], other: list[tuple[float, float]], carry: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_CARRY_AFTER", carry)
        made, taken = sums_of(one), sums_of(other)
        made.take_in(taken)
        made.take_in(ExactSums(2))
        np.testing.assert_array_equal(made.canonical(), sums_of([*one, *other]).canonical())
        np.testing.assert_array_equal(taken.canonical(), sums_of(other).canonical())


def test_limbs_in_another_form_are_brought_into_the_one_that_equal_sums_share() -> None:
    limbs = np.zeros((1, LIMBS), np.int64)
    limbs[0, 3:5] = (5 << 32) + 7, -2
    found = ExactSums(1, limbs)
    assert found.canonical()[0, 3:6].tolist() == [7, 3, 0]


def test_merging_and_copying_leave_both_as_they_were() -> None:
    one, other = sums_of([(1.5, -2.0)]), sums_of([(2.0**80, 0.25)])
    copied = one.copy()
    both = one.merged(other)
    copied.add(np.array([1.0, 1.0]))
    both.add(np.array([1.0, 1.0]))
    assert one.values().tolist() == [1.5, -2.0]
    assert other.values().tolist() == [2.0**80, 0.25]
    assert copied.values().tolist() == [2.5, -1.0]

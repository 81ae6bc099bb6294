"""The search over range estimators, on made-up errors."""

from collections.abc import Mapping

import numpy as np
import pytest

from qcompiler.search.ranges import RangeTerms, choose_ranges, decibels, split_evenly, surely_less

GROUPS = tuple(f"g{i}" for i in range(8))


class Bench:
    """Error per row as a sum over groups; every group has its own error per estimator."""

    def __init__(self, table: Mapping[str, Mapping[str, float]], rows: int = 4, spread: float = 0.0) -> None:
        self.table, self.calls = table, 0
        self.weights = 1.0 + spread * np.linspace(-1, 1, rows)

    def __call__(self, estimator: str, estimators: Mapping[str, str]) -> np.ndarray:
        self.calls += 1
        total = sum(self.table[estimators.get(g, estimator)].get(g, 1.0) for g in GROUPS)
        return total * self.weights / self.weights.size


def test_the_best_whole_estimator_wins_and_regions_depart_where_another_is_better() -> None:
    bench = Bench({"a": {"g2": 5.0}, "b": {"g0": 9.0, "g1": 9.0}, "c": {"g0": 50.0}})
    found = choose_ranges(["c", "b", "a"], GROUPS, bench, RangeTerms(regions=8, behind_db=4.0))
    assert found.estimator == "a"
    assert found.estimators == {"g2": "b"}
    assert found.whole_db == {
        name: pytest.approx(-10 * np.log10(e), abs=0.01) for name, e in (("a", 12), ("b", 24), ("c", 57))
    }
    assert found.sqnr_db == pytest.approx(-10 * np.log10(8), abs=0.01)
    assert found.tried == bench.calls == 3 + 8


def test_an_estimator_far_behind_is_not_tried_on_regions() -> None:
    bench = Bench({"a": {}, "b": {"g0": 100.0, "g1": 0.0}})
    found = choose_ranges(["a", "b"], GROUPS, bench, RangeTerms(regions=8))
    assert (found.estimator, found.estimators, found.tried) == ("a", {}, 2)


def test_an_estimator_that_measures_the_same_is_not_tried_twice() -> None:
    bench = Bench({"a": {}, "b": {}})
    assert choose_ranges(["a", "b"], GROUPS, bench).tried == 2


def test_of_equals_the_first_wins() -> None:
    assert choose_ranges(["b", "a"], GROUPS, Bench({"a": {}, "b": {}})).estimator == "b"


def test_chance_does_not_overrule_what_is_expected_to_be_best() -> None:
    errors = {"expected": np.ones(100), "lucky": np.ones(100), "better": np.full(100, 0.95)}
    errors["lucky"][:3] = 0.0
    errors["lucky"][3:5] = 1.5

    def evaluate(estimator: str, estimators: Mapping[str, str]) -> np.ndarray:
        return errors[estimator]

    assert choose_ranges(["expected", "lucky"], [], evaluate, RangeTerms(doubt=2.0)).estimator == "expected"
    assert choose_ranges(["lucky", "expected"], [], evaluate).estimator == "lucky"
    assert choose_ranges(["expected", "lucky", "better"], [], evaluate).estimator == "better"


def test_builds_are_bounded() -> None:
    bench = Bench({name: {"g0": 1.0 + i / 100} for i, name in enumerate("abcdef")})
    found = choose_ranges("abcdef", GROUPS, bench, RangeTerms(regions=4, alternates=3))
    assert found.tried == bench.calls <= 6 + 4 * 3


def test_without_groups_only_the_whole_model_is_measured() -> None:
    found = choose_ranges(["a", "b"], [], Bench({"a": {"g0": 2.0}, "b": {}}))
    assert (found.estimator, found.estimators, found.tried) == ("b", {}, 2)


def test_what_a_few_rows_make_is_no_gain() -> None:
    level = np.full(100, 1.0)
    lucky = level.copy()
    lucky[0] = 0.1
    assert not surely_less(lucky, level, 1.5)
    assert surely_less(lucky, level, 0.0)
    assert surely_less(level * 0.99, level, 1.0)
    assert not surely_less(level, level, 1.0)
    assert not surely_less(level * 1.01, level, 1.0)
    noisy = level * 0.9 + np.tile([0.3, -0.3], 50)
    assert surely_less(noisy, level, 1.5)


def test_errors_without_bound_are_never_less() -> None:
    broken = np.array([0.0, np.inf])
    assert not surely_less(broken, np.ones(2), 1.0)
    assert not surely_less(np.zeros(2), broken, 1.0)
    assert decibels(broken) == -200.0


@pytest.mark.parametrize(("errors", "wanted"), [([0.005, 0.005], 20.0), ([0.0], 200.0), ([], 200.0), ([10.0], -10.0)])
def test_decibels(errors: list[float], wanted: float) -> None:
    assert decibels(np.array(errors)) == pytest.approx(wanted)


@pytest.mark.parametrize(("count", "parts"), [(0, 4), (1, 4), (7, 3), (8, 8), (5, 100)])
def test_an_even_split_keeps_all_in_order(count: int, parts: int) -> None:
    names = [str(i) for i in range(count)]
    runs = split_evenly(names, parts)
    assert [n for run in runs for n in run] == names
    assert len(runs) == min(count, parts)
    assert not runs or max(map(len, runs)) - min(map(len, runs)) <= 1

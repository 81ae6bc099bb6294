"""The accuracy guard on invented models: noise powers that add up, and prices that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from qcompiler.quant.plan import Form
from qcompiler.search.accuracy import AccuracyGuard, AccuracyResult, Bound, Terms
from qcompiler.search.quality import CEILING, Quality

STRICT = Terms(share=0.0)
"""Buys nothing beyond the bound."""


@dataclass
class Invented:
    """A model whose groups add noise: SQNR = -10 log10 of the sum over integer groups.

    Attributes:
        noise: noise power per group on integers, at a signal power of 1.
        float_us: time per group in float.
        integer_us: time per group on integers.
    """

    noise: Mapping[str, float]
    float_us: Mapping[str, float] = field(default_factory=dict)
    integer_us: float = 1.0
    evaluated: list[frozenset[str]] = field(default_factory=list)

    def integers(self, forms: Mapping[str, Form]) -> frozenset[str]:
        return frozenset(n for n in self.noise if forms.get(n, "float") != "float")

    def evaluate(self, forms: Mapping[str, Form]) -> Quality:
        inside = self.integers(forms)
        self.evaluated.append(inside)
        total = sum(self.noise[n] for n in inside)
        return Quality({"y": min(CEILING, -10 * math.log10(total)) if total else CEILING})

    def predict(self, forms: Mapping[str, Form]) -> float:
        inside = self.integers(forms)
        return sum(self.integer_us if n in inside else self.float_us.get(n, 10.0) for n in self.noise)

    def guard(
        self,
        bound: Bound,
        *,
        terms: Terms = STRICT,
        sets: Sequence[tuple[str, ...]] | None = None,
        frozen: frozenset[str] = frozenset(),
        evaluate: Callable[[Mapping[str, Form]], Quality] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> AccuracyResult:
        sets = [(n,) for n in self.noise] if sets is None else sets
        guard = AccuracyGuard(
            sets, evaluate or self.evaluate, bound, self.predict, frozen=frozen, terms=terms, progress=progress
        )
        forms: dict[str, Form] = dict.fromkeys(self.noise, "static")
        return guard.run(forms)


def returned(result: AccuracyResult) -> list[tuple[str, ...]]:
    return [s.groups for s in result.steps]


def test_a_good_model_is_measured_once_and_left_alone() -> None:
    model = Invented({"a": 1e-4, "b": 1e-4})
    result = model.guard(Bound({"y": 20.0}))
    assert result.forms == {"a": "static", "b": "static"}
    assert (result.met, result.tried, result.steps) == (True, 1, [])
    assert result.quality.worst == pytest.approx(-10 * math.log10(2e-4))


def test_the_one_noisy_group_returns_and_no_other() -> None:
    model = Invented({"a": 1e-4, "b": 1e-1, "c": 1e-4})
    result = model.guard(Bound({"y": 20.0}))
    assert result.forms == {"a": "static", "b": "float", "c": "static"}
    assert result.met
    (step,) = result.steps
    assert step.groups == ("b",)
    assert step.demanded
    assert step.before_db == pytest.approx(-10 * math.log10(0.1002))
    assert step.after_db == pytest.approx(-10 * math.log10(2e-4))
    assert step.percent == 300.0  # 3 us become 12


def test_between_equally_noisy_groups_the_cheaper_returns() -> None:
    noise = {"a": 6e-3, "b": 6e-3, "c": 1e-4}
    for cheap in "ab":
        model = Invented(noise, {**dict.fromkeys(noise, 50.0), cheap: 5.0})
        assert returned(model.guard(Bound({"y": 20.0}))) == [(cheap,)]


def test_among_sets_that_meet_the_bound_the_cheapest_is_taken() -> None:
    model = Invented({"a": 9e-3, "b": 9e-3, "c": 1e-4}, {"a": 20.0, "b": 4.0, "c": 30.0})
    result = model.guard(Bound({"y": 20.0}), sets=[("a", "b", "c"), ("a", "b"), ("a",), ("b",)])
    assert returned(result) == [("b",)]
    assert result.met


def test_groups_return_one_after_the_other_until_the_bound_is_met() -> None:
    noise = {"a": 3e-2, "b": 2e-2, "c": 1e-2, "d": 5e-3}
    result = Invented(noise).guard(Bound({"y": 20.0}))
    assert {n for n, f in result.forms.items() if f == "float"} == {"a", "b", "c"}
    assert result.met
    assert result.quality.worst == pytest.approx(-10 * math.log10(5e-3))
    befores = [s.before_db for s in result.steps]
    assert befores == sorted(befores)


def test_patience_looks_beyond_the_first_that_do_not_help() -> None:
    """The guilty group is the last of many candidates, far behind the width of one round."""
    noise = {f"g{i:02}": 1e-6 for i in range(40)} | {"guilty": 1e-1}
    result = Invented(noise).guard(Bound({"y": 20.0}))
    assert returned(result) == [("guilty",)]
    assert result.tried == 42  # the start, 24 sets, then rounds of 6 until one helps


def test_a_set_that_helps_only_as_a_whole_is_found() -> None:
    """Two groups spoil the output whether one or both of them do."""
    model = Invented(dict.fromkeys("abcd", 1e-5))

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        spoiled = {"b", "c"} & model.integers(forms)
        return Quality({"y": 5.0 if spoiled else 40.0})

    result = model.guard(Bound({"y": 20.0}), sets=[("a",), ("b",), ("c",), ("d",), ("b", "c")], evaluate=evaluate)
    assert returned(result) == [("b", "c")]
    assert result.met


def test_where_nothing_helps_by_itself_the_search_does_not_stall() -> None:
    """Every group must return; until the last has, nothing changes."""
    model = Invented(dict.fromkeys("abcd", 1e-5))

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        return Quality({"y": 5.0 if model.integers(forms) else CEILING})

    result = model.guard(Bound({"y": 20.0}), sets=[("a",), ("b",), ("c", "d")], evaluate=evaluate)
    assert set(result.forms.values()) == {"float"}
    assert returned(result)[0] == ("c", "d")  # the largest first
    assert result.met


def test_outputs_that_are_no_numbers_do_not_stall_the_search_either() -> None:
    model = Invented(dict.fromkeys("abc", 1e-5))

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        return Quality({"y": -CEILING if {"a", "b"} <= model.integers(forms) else 50.0})

    result = model.guard(Bound({"y": 20.0}), evaluate=evaluate)
    assert result.met
    assert len(returned(result)) == 1


def test_a_bound_that_float_groups_alone_cannot_meet_is_reported() -> None:
    model = Invented(dict.fromkeys("ab", 1e-1))
    result = model.guard(Bound({"y": 20.0}), evaluate=lambda forms: Quality({"y": 3.0}))
    assert not result.met
    assert set(result.forms.values()) == {"float"}


def test_frozen_groups_are_kept_and_leave_their_sets() -> None:
    model = Invented({"a": 1e-1, "b": 1e-1, "c": 1e-5})
    result = model.guard(Bound({"y": 20.0}), sets=[("a", "b"), ("a",), ("c",)], frozen=frozenset({"a"}))
    assert result.forms["a"] == "static"
    assert returned(result)[0] == ("b",)
    assert not result.met


def test_each_output_has_its_own_bound() -> None:
    model = Invented(dict.fromkeys("ab", 1e-5))

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        inside = model.integers(forms)
        return Quality({"y": 18.0 if "a" in inside else 40.0, "state": 25.0 if "b" in inside else 50.0})

    assert returned(model.guard(Bound({"y": 15.0, "state": 30.0}), evaluate=evaluate)) == [("b",)]
    assert returned(model.guard(Bound({"y": 20.0, "state": 20.0}), evaluate=evaluate)) == [("a",)]
    assert returned(model.guard(Bound({"y": 15.0, "state": 20.0}), evaluate=evaluate)) == []


def test_agreement_and_metric_are_demanded_as_well() -> None:
    model = Invented(dict.fromkeys("ab", 1e-5))

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        inside = model.integers(forms)
        return Quality({"y": 40.0}, {"y": 0.9 if "a" in inside else 1.0}, metric=0.7 if "b" in inside else 0.8)

    assert returned(model.guard(Bound(agreement=0.97), evaluate=evaluate)) == [("a",)]
    assert returned(model.guard(Bound(metric=0.75), evaluate=evaluate)) == [("b",)]
    both = model.guard(Bound(agreement=0.97, metric=0.75), evaluate=evaluate)
    assert sorted(returned(both)) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("bound", "quality", "shortfall"),
    [
        (Bound(), Quality({"y": -3.0}), 3.0),  # an output without a bound of its own is held to 0 dB
        (Bound({"y": 20.0}), Quality({"y": 20.0}), 0.0),
        (Bound({"y": 20.0}), Quality({"y": 18.5}), 1.5),
        (Bound({"y": 20.0, "z": 30.0}), Quality({"y": 18.5, "z": 26.0}), 4.0),
        (Bound(agreement=0.97), Quality(agreement={"y": 0.95}), 2.0),
        (Bound(metric=0.8), Quality(metric=0.79), 10.0),
        (Bound(metric=0.8), Quality(), 0.0),
        (Bound({"y": 20.0}, 0.97, 0.8), Quality({"y": 19.0}, {"y": 0.96}, metric=0.8), 2.0),
    ],
)
def test_the_shortfall_weighs_decibels_agreement_and_metric(bound: Bound, quality: Quality, shortfall: float) -> None:
    assert bound.shortfall(quality) == pytest.approx(shortfall)


# ---- comfort --------------------------------------------------------------------------------------------------------


def test_beyond_the_bound_cheap_accuracy_is_bought() -> None:
    model = Invented({"a": 9e-3, "b": 1e-4}, {"a": 1.02, "b": 1000.0})
    result = model.guard(Bound({"y": 20.0}), terms=Terms())
    (step,) = result.steps
    assert step.groups == ("a",)
    assert not step.demanded
    assert result.quality.worst == pytest.approx(40.0)


def test_dear_accuracy_is_not() -> None:
    model = Invented({"a": 9e-3, "b": 1e-4}, {"a": 2000.0, "b": 1000.0})
    assert model.guard(Bound({"y": 20.0}), terms=Terms()).steps == []


def test_comfort_spends_no_more_than_its_share_of_the_gain() -> None:
    """Ten groups of equal price and noise: all float costs 100, all integers 10, and a fifth of 90 may be spent."""
    names = [f"g{i}" for i in range(10)]
    model = Invented(dict.fromkeys(names, 9e-4), dict.fromkeys(names, 10.0))
    terms = Terms(share=0.2, db_per_percent=0.0, comfort_db=100.0)
    result = model.guard(Bound({"y": 20.0}), terms=terms)
    assert len(result.steps) == 2  # 10 + 2 x 9 <= 10 + 18
    assert model.predict(result.forms) <= 10 + 0.2 * 90


def test_comfort_stops_where_it_is_reached() -> None:
    model = Invented({"a": 5e-3, "b": 9e-4, "c": 9e-5}, dict.fromkeys("abc", 1.0))
    result = model.guard(Bound({"y": 20.0}), terms=Terms(comfort_db=30.0))
    assert returned(result) == [("a",)]
    assert result.quality.worst == pytest.approx(-10 * math.log10(9.9e-4))


def test_comfort_never_breaks_the_bound() -> None:
    """Returning a gains 5 dB in one output and loses the agreement."""
    model = Invented({"a": 5e-3, "b": 1e-3}, {"a": 1.0, "b": 1000.0})

    def evaluate(forms: Mapping[str, Form]) -> Quality:
        inside = model.integers(forms)
        return Quality({"y": 22.0 if "a" in inside else 27.0}, {"y": 1.0 if "a" in inside else 0.9})

    assert model.guard(Bound({"y": 20.0}, 0.97), terms=Terms(), evaluate=evaluate).steps == []


def test_without_predicted_times_comfort_still_wants_its_gain() -> None:
    model = Invented({"a": 5e-3, "b": 1e-4}, dict.fromkeys("ab", 0.0), integer_us=0.0)
    assert returned(model.guard(Bound({"y": 20.0}), terms=Terms())) == [("a",)]


# ---- effort --------------------------------------------------------------------------------------------------------


def test_no_more_builds_are_measured_than_allowed() -> None:
    noise = {f"g{i:02}": 1e-6 * (i + 1) for i in range(60)}
    model = Invented(noise)
    result = model.guard(Bound({"y": 20.0}), terms=Terms(comfort_db=150.0, db_per_percent=1e9, trials=9))
    assert result.tried == len(model.evaluated) == 9
    assert result.met
    assert result.steps == []


def test_the_bound_is_met_even_when_the_trials_are_used_up() -> None:
    noise = {f"g{i:02}": 1e-1 for i in range(30)}
    sets = [(n,) for n in noise] + [tuple(noise)]
    result = Invented(noise).guard(Bound({"y": 20.0}), sets=sets, terms=Terms(share=0.0, trials=5))
    assert result.met
    assert set(result.forms.values()) == {"float"}


def test_later_rounds_measure_few_sets() -> None:
    noise = {f"g{i}": 2.0**-i * 1e-2 for i in range(12)}
    model = Invented(noise)
    result = model.guard(Bound({"y": 30.0}))
    rounds = len(result.steps)
    assert rounds >= 3
    assert result.tried <= 1 + 12 + (rounds - 1) * 6


def test_progress_says_what_returned_and_what_for() -> None:
    lines: list[str] = []
    model = Invented({"a": 1e-1, "b": 1e-1, "c": 1e-4})
    model.guard(Bound({"y": 20.0}), sets=[("a", "b")], progress=lines.append)
    assert lines == ["accuracy guard: a and 1 more to float, 7.0 -> 40.0 dB for 600.0 % of the latency"]


def test_a_return_of_everything_is_not_credited_with_being_equal_to_float() -> None:
    """Equal to float is 200 dB; what the bound lacks are 3 of them, which one cheap group has."""
    model = Invented({"a": 1e-2, "b": 5e-3, "c": 5e-3}, {"a": 11.0, "b": 21.0, "c": 21.0})
    result = model.guard(Bound({"y": 19.9}), sets=[("a", "b", "c"), ("a",), ("b",), ("c",)])
    assert returned(result) == [("a",)]

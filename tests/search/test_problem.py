"""The planner's problem refuses what cannot be meant."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qcompiler.errors import BudgetError
from qcompiler.search.problem import Cause, Charge, Limits, Option, Problem

FLOAT = Option("float", 3.0, 40, {}, 320.0)


def problem(option: Option = FLOAT, charge: Charge | None = None, weights: int = 10) -> Problem:
    return Problem({"g": (option,)}, () if charge is None else (charge,), ("y",), weights=weights)


def test_a_problem_is_frozen_and_compares_by_value() -> None:
    one = problem()
    assert one == problem()
    assert (one.fixed_cost, one.fixed_bytes) == (0.0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.fixed_cost = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (Option("a", math.nan, 0), "the cost of option 'a' of group 'g' is nan; expected a finite number"),
        (Option("a", math.inf, 0), "the cost of option 'a' of group 'g' is inf"),
        (Option("a", 1.0, -1), "the bytes of option 'a' of group 'g' is -1; expected at least 0"),
        (Option("a", 1.0, 0, {}, -8.0), "the bits of option 'a'"),
        (Option("a", 1.0, 0, {"y": -1e-9}), "the noise of option 'a' of group 'g' at 'y' is -1e-09"),
        (Option("a", 1.0, 0, {"z": 0.1}), "adds noise at 'z', which is none of the outputs"),
    ],
)
def test_an_option_without_sense_is_refused(option: Option, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        problem(option)


@pytest.mark.parametrize(
    ("charge", "message"),
    [
        (Charge("c", (), cost=-1.0), "the cost of charge 'c' is -1"),
        (Charge("c", (), bytes=-1), "the bytes of charge 'c' is -1"),
        (Charge("c", (), noise={"y": math.inf}), "the noise of charge 'c' at 'y' is inf"),
        (Charge("c", (Cause((("g", "int8"),)),)), "charge 'c' names option 'int8' of group 'g', which does not exist"),
        (Charge("c", (Cause((), (("h", "float"),)),)), "charge 'c' names option 'float' of group 'h'"),
    ],
)
def test_a_charge_without_sense_is_refused(charge: Charge, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        problem(charge=charge)


def test_names_are_unique_and_groups_have_options() -> None:
    with pytest.raises(BudgetError, match="group 'g' has no option"):
        Problem({"g": ()}, (), ())
    with pytest.raises(BudgetError, match="option of group 'g' 'float' is given twice"):
        Problem({"g": (FLOAT, FLOAT)}, (), (), weights=1)
    with pytest.raises(BudgetError, match="charge 'c' is given twice"):
        Problem({}, (Charge("c", ()), Charge("c", ())), ())
    with pytest.raises(BudgetError, match="output 'y' is given twice"):
        Problem({}, (), ("y", "y"))


def test_bits_need_weights_to_be_averaged_over() -> None:
    with pytest.raises(BudgetError, match="stores 320 bits of weights, but the problem counts 0 weights"):
        problem(weights=0)


def test_time_alone_may_be_negative_for_it_can_be_a_difference() -> None:
    made = Problem({"g": (Option("a", -2.0, 0),)}, (), (), fixed_cost=-1.0)
    assert made.options["g"][0].cost == -2.0
    with pytest.raises(BudgetError, match="the fixed cost is nan"):
        Problem({}, (), (), fixed_cost=math.nan)
    with pytest.raises(BudgetError, match="the fixed bytes is -1"):
        Problem({}, (), (), fixed_bytes=-1)


@pytest.mark.parametrize(
    "given",
    [{"bytes": 0}, {"bits": -1.0}, {"latency_us": math.nan}, {"latency_us": math.inf}, {"noise": {"y": 0.0}}],
)  # fmt: skip
def test_a_limit_is_a_positive_finite_number(given: dict[str, object]) -> None:
    with pytest.raises(BudgetError, match="expected a positive finite number"):
        Limits(**given)  # type: ignore[arg-type]


def test_no_limit_is_set_by_default() -> None:
    assert Limits() == Limits({}, None, None, None)

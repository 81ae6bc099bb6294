"""Pareto fronts and the point that is taken of them."""

from __future__ import annotations

import itertools

import pytest

from qcompiler.search.front import Front, all_float, choose_knee, front
from qcompiler.search.problem import Limits, Option, Problem
from qcompiler.search.solution import InfeasibleError, Point, Solution
from tests.search.problems import chain, close, every, random_problem


def least(points: list[Point], worst_db: float) -> float:
    return min(p.cost_us for p in points if p.worst_db >= worst_db)


@pytest.mark.parametrize("seed", range(4))
def test_no_choice_dominates_a_point_of_a_front(seed: int) -> None:
    problem = random_problem(seed, groups=5)
    points = list(every(problem))
    noise = front(problem, Limits(), steps=6)
    for point in noise.points:
        assert close(point.cost_us, least(points, point.worst_db))
    sizes = front(problem, Limits(), "bytes", steps=6)
    for point in sizes.points:
        assert close(point.cost_us, min(p.cost_us for p in points if p.bytes <= point.bytes))
    for swept in (noise, sizes):
        assert close(swept.points[0].cost_us, min(p.cost_us for p in points))
        costs = [p.cost_us for p in swept.points]
        assert costs == sorted(set(costs))
    levels = [p.worst_db for p in noise.points]
    assert levels == sorted(set(levels))
    assert noise.points[-1].worst_db == pytest.approx(max(p.worst_db for p in points))
    bytes_ = [p.bytes for p in sizes.points]
    assert bytes_ == sorted(set(bytes_), reverse=True)
    assert bytes_[-1] == min(p.bytes for p in points)


def test_enough_steps_find_the_whole_front() -> None:
    problem = random_problem(7, groups=5)
    points = list(every(problem))
    whole = [
        p for p in points
        if not any(o.cost_us <= p.cost_us and o.worst_db >= p.worst_db and o.choice != p.choice for o in points)
    ]  # fmt: skip
    whole.sort(key=lambda p: p.worst_db)
    steps = 200
    step = (whole[-1].worst_db - whole[0].worst_db) / steps
    apart = [b for a, b in itertools.pairwise(whole) if b.worst_db - a.worst_db > step]
    swept = front(problem, Limits(), steps=steps, top_db=300.0)
    assert len(apart) >= 6
    assert {round(p.cost_us, 6) for p in swept.points} >= {round(p.cost_us, 6) for p in apart}


def test_a_front_holds_its_limits_and_pins() -> None:
    problem = chain(6)
    swept = front(problem, Limits(bytes=1700), pinned={"g0": "static"}, steps=5)
    assert all(p.bytes <= 1700 and p.choice["g0"] == "static" for p in swept.points)
    assert swept.all_float.choice == {**dict.fromkeys(problem.options, "float"), "g0": "static"}
    with pytest.raises(InfeasibleError):
        front(problem, Limits(bytes=100))


def test_all_float_takes_the_first_option_where_there_is_no_float() -> None:
    problem = Problem({"a": (Option("x", 1, 1), Option("y", 1, 1)), "b": (Option("z", 1, 1), Option("float", 1, 1))},
                      (), ())  # fmt: skip
    assert all_float(problem) == {"a": "x", "b": "float"}
    assert all_float(problem, {"a": "y"}) == {"a": "y", "b": "float"}


def swept(*points: tuple[float, float], float_us: float = 200.0) -> Front:
    """Return a front of (us, dB)."""
    made = [Solution({"g": str(i)}, us, 0, 0.0, {"y": 10 ** (-db / 10)}) for i, (us, db) in enumerate(points)]
    return Front("noise", tuple(made), Point({}, float_us, 0, 0.0, {"y": 0.0}))


def knee(*points: tuple[float, float], **terms: float) -> float:
    return choose_knee(swept(*points), **terms).cost_us


def test_accuracy_is_bought_while_a_percent_buys_enough() -> None:
    # 1 % each: +0.5 dB, +0.4 dB, +0.2 dB.
    assert knee((100, 20), (101, 20.5), (102.01, 20.9), (103.03, 21.1)) == 102.01
    assert knee((100, 20), (101, 20.5), (102.01, 20.9), (103.03, 21.1), db_per_percent=0.45) == 101
    assert knee((100, 20), (101, 20.2), (103, 20.4)) == 100


def test_a_poor_step_is_passed_over_for_a_good_one_behind_it() -> None:
    assert knee((100, 20), (101, 20.1), (102, 24)) == 102


def test_nothing_is_bought_beyond_comfort() -> None:
    assert knee((100, 31), (100.1, 40)) == 100
    assert knee((100, 29), (101, 30), (101.5, 40)) == 101
    assert knee((100, 29.9), (101, 60)) == 100, "only 0.1 dB of the step counts"
    assert knee((100, 29.9), (101, 60), comfort_db=60.0) == 101


def test_only_a_share_of_the_gain_in_speed_is_spent() -> None:
    # Over all-float 100 us are won, of which 20 may be spent.
    assert knee((100, 10), (119, 20), (121, 30)) == 119
    assert knee((100, 10), (119, 20), (121, 30), share=0.3) == 121
    assert choose_knee(swept((100, 10), (119, 20), float_us=90.0)).cost_us == 100


def test_a_very_cheap_step_counts_as_a_fifth_of_a_percent() -> None:
    assert knee((100, 20), (100.001, 20.055)) == 100, "0.055 dB for 0.2 %: 0.275 dB per percent"
    assert knee((100, 20), (100.001, 20.065)) == 100.001
    assert knee((100, 20), (100.001, 20.04), db_per_percent=0.0) == 100, "0.04 dB are within the error of an SQNR"

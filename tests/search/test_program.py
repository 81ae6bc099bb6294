"""The integer program against trying every choice, and on problems whose answer is known by hand."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcompiler.errors import BudgetError
from qcompiler.search.formulation import ratio
from qcompiler.search.problem import Cause, Charge, Limits, Option, Problem
from qcompiler.search.program import Settings, evaluate, solve
from qcompiler.search.quality import CEILING, decibels
from qcompiler.search.solution import (
    NOISE,
    InfeasibleError,
    Point,
    bounds_of,
    noise_power,
)
from qcompiler.search.solver_output import without_stray_lines
from tests.search.problems import chain, close, every, random_problem

OBJECTIVES = ("latency", "bytes", "noise")


def value_of(problem: Problem, limits: Limits, objective: str) -> Callable[[Point], float]:
    """Return what an objective minimises, as the documentation defines it."""
    references = {NOISE + o: limits.noise.get(o, 1.0) for o in problem.outputs}
    return (lambda p: ratio(p, references)) if objective == "noise" else (lambda p: p.amount(objective))


def random_limits(seed: int, points: list[Point], outputs: tuple[str, ...]) -> Limits:
    """Return limits that are values of choices (so that they hold with equality), or a little below them."""
    rng = random.Random(seed)
    one, two = rng.choice(points), rng.choice(points)
    tight = rng.choice([1.0, 1.0, 1.1, 0.9])
    return Limits(
        noise={o: (rng.choice([one, two]).noise[o] or 1e-9) * tight for o in outputs if rng.random() < 0.6},
        bytes=max(1, int(one.bytes * rng.choice([1, 1, 0.95]))) if rng.random() < 0.5 else None,
        bits=(two.bits or 1.0) if rng.random() < 0.3 else None,
        latency_us=max(1e-3, one.cost_us * rng.choice([1.0, 0.95])) if rng.random() < 0.4 else None,
    )


@pytest.mark.parametrize("seed", [*range(36), 1047])
def test_it_finds_what_trying_every_choice_finds(seed: int) -> None:
    rng = random.Random(seed)
    problem = random_problem(seed, groups=rng.randint(1, 5), outputs=rng.randint(1, 3), charges=rng.randint(0, 10))
    points = list(every(problem))
    limits = random_limits(seed + 1000, points, problem.outputs)
    bounds = bounds_of(limits)
    feasible = [p for p in points if all(p.amount(n) <= b for n, b in bounds.items())]
    for objective in OBJECTIVES:
        value = value_of(problem, limits, objective)
        try:
            found = solve(problem, limits, objective, prices=False)
        except InfeasibleError as error:
            assert not feasible
            check_nearest(error, points, bounds)
            continue
        assert all(found.amount(n) <= b for n, b in bounds.items()), "budgets hold exactly"
        best = min(map(value, feasible))
        assert close(value(found), best)
        assert found.gap < 1e-8
        fastest = min(p.cost_us for p in feasible if value(p) <= best * (1 + 1e-12))
        assert close(found.cost_us, fastest), "of equally good choices the fastest"
        assert dataclasses.asdict(evaluate(problem, found.choice)).items() <= dataclasses.asdict(found).items()


def check_nearest(error: InfeasibleError, points: list[Point], bounds: dict[str, float]) -> None:
    """Compare the nearest point with the true one, and the limits named with what no choice can hold."""
    nearest = min(max(p.amount(n) / b for n, b in bounds.items()) for p in points)
    assert close(max(error.nearest.amount(n) / b for n, b in bounds.items()), nearest)
    assert close(1.0 + error.violation, nearest)
    assert not [p for p in points if all(p.amount(n) <= bounds[n] for n in error.limits)]
    for name in bounds:
        assert close(error.least[name], min(p.amount(name) for p in points))
    if not any(error.least[n] > bounds[n] for n in error.limits):
        for left_out in error.limits:
            rest = [n for n in error.limits if n != left_out]
            assert [p for p in points if all(p.amount(n) <= bounds[n] for n in rest)], "no smaller set conflicts"


def static_of(problem: Problem, **given: object) -> set[str]:
    found = solve(problem, Limits(**given), prices=False)  # type: ignore[arg-type]
    return {g for g, o in found.choice.items() if o == "static"}


def test_a_region_is_worth_its_conversions_or_none_of_it_is() -> None:
    # A conversion in and one out cost 12: one group wins 10, two win 20.
    assert static_of(chain(1)) == set()
    assert static_of(chain(2)) == {"g0", "g1"}
    found = solve(chain(2), Limits())
    assert found.cost_us == 3.0 + 2 * 10.0 + 12.0
    assert found.paid == ("quantize:v0", "value:v0", "value:v1", "dequantize:v2", "value:v2")
    assert found.bytes == 50 + 200
    assert found.bits == 8.0
    assert found.noise == {"y": math.fsum([1e-4, 1e-4, 1e-5, 1e-5, 1e-5])}
    assert found.sqnr_db["y"] == pytest.approx(36.3827, abs=1e-4)


def test_a_gap_is_bridged_if_that_is_cheaper_than_converting_twice() -> None:
    # Going back to float in the middle costs 12 more; losing 8 there is better, losing 15 is not.
    assert static_of(chain(5, g2=-8.0)) == {"g0", "g1", "g2", "g3", "g4"}
    assert static_of(chain(5, g2=-15.0)) == {"g0", "g1", "g3", "g4"}


def test_a_noise_limit_buys_back_the_cheapest_groups() -> None:
    problem = chain(6, g0=14.0, g5=12.0)
    # Six groups and seven values: 6.7e-4. Five groups and six values: 5.6e-4; g5 at the end frees a value, too.
    assert static_of(problem) == {f"g{i}" for i in range(6)}
    assert static_of(problem, noise={"y": 5.65e-4}) == {f"g{i}" for i in range(5)}
    assert static_of(problem, noise={"y": 1e-9}) == set()


def test_pinned_groups_stay() -> None:
    problem = chain(3)
    found = solve(problem, Limits(), pinned={"g1": "float"})
    assert found.choice == {"g0": "float", "g1": "float", "g2": "float"}
    assert solve(problem, Limits(), pinned=dict.fromkeys(problem.options, "static")).choice["g1"] == "static"
    with pytest.raises(BudgetError, match="pinned group 'h' is not among the 3 groups"):
        solve(problem, Limits(), pinned={"h": "float"})
    with pytest.raises(BudgetError, match="group 'g0' is pinned to 'int4'; expected one of float, static"):
        solve(problem, Limits(), pinned={"g0": "int4"})


def test_unknown_words_are_refused() -> None:
    with pytest.raises(BudgetError, match="cannot minimise 'time'; expected one of latency, bytes, noise"):
        solve(chain(1), Limits(), "time")
    with pytest.raises(BudgetError, match=r"names 'z', which is none of the outputs \('y',\)"):
        solve(chain(1), Limits({"z": 1e-3}))
    with pytest.raises(BudgetError, match="group 'g0' has no option None; expected one of float, static"):
        evaluate(chain(1), {})


def test_a_problem_without_groups_has_one_answer() -> None:
    problem = Problem({}, (), ("y",), fixed_cost=5.0, fixed_bytes=7)
    assert solve(problem, Limits()).cost_us == 5.0
    with pytest.raises(InfeasibleError, match=r"bytes <= 0\.006 kB cannot hold: the best of all plans has 0\.007 kB"):
        solve(problem, Limits(bytes=6))


def test_a_cause_excused_by_its_own_option_never_holds() -> None:
    key = ("g", "a")
    options = {"g": (Option("b", 2.0, 0), Option("a", 1.0, 0))}
    never = Problem(options, (Charge("c", (Cause((key,), (key,)), Cause(())), cost=50.0),), ())
    assert (solve(never, Limits()).choice, solve(never, Limits()).paid) == ({"g": "a"}, ())
    own = Problem(options, (Charge("c", (Cause((key,), (("g", "b"),)),), cost=50.0),), ())
    assert solve(own, Limits()).choice == {"g": "b"}


def test_ties_go_to_the_less_noisy_then_the_smaller_then_the_earlier_option() -> None:
    options = {
        "noise": (Option("float", 1.0, 9), Option("static", 1.0, 1, {"y": 0.1})),
        "bytes": (Option("float", 1.0, 9), Option("static", 1.0, 1)),
        "order": (Option("float", 1.0, 1), Option("static", 1.0, 1)),
        "time": (Option("float", 1.5, 1), Option("static", 1.0, 9, {"y": 0.1})),
    }
    found = solve(Problem(options, (), ("y",)), Limits())
    assert found.choice == {"noise": "float", "bytes": "static", "order": "float", "time": "static"}


def test_equal_problems_have_equal_solutions() -> None:
    for seed in range(4):
        problem = random_problem(seed, groups=8, charges=14)
        turned = dataclasses.replace(problem, options=dict(reversed(problem.options.items())))
        assert turned == problem
        limits = Limits({"y0": 5e-2})
        one, two = solve(problem, limits), solve(turned, limits)
        assert one == two == solve(problem, limits)


def test_a_reference_weighs_the_outputs() -> None:
    options = {"g": (Option("a", 1.0, 0, {"y": 1e-2, "z": 1e-4}), Option("b", 1.0, 0, {"y": 1e-3, "z": 1e-3}))}
    problem = Problem(options, (), ("y", "z"))
    assert solve(problem, Limits(), "noise").choice == {"g": "b"}
    assert solve(problem, Limits(), "noise", reference={"y": 1.0, "z": 1e-3}).choice == {"g": "a"}


def test_a_large_problem_is_solved_to_the_optimum() -> None:
    found = solve(long_chain(300), Limits({"y": 2e-3}), prices=False)
    assert found.gap <= 1e-6
    assert found.noise["y"] <= 2e-3
    assert set(found.choice.values()) == {"float", "static", "dynamic", "weight-only"}


def long_chain(groups: int) -> Problem:
    """Return groups in a row of four options each, with conversions and noise per value."""
    rng = random.Random(3)
    options, charges = {}, []
    for i in range(groups):
        slow, elements, noise = 10 ** rng.uniform(0, 3), int(10 ** rng.uniform(3, 6)), 10 ** rng.uniform(-7, -3.5)
        static, dynamic, packed = ({"y": noise * factor} for factor in (1.0, 0.5, 2.0))
        options[f"g{i}"] = (
            Option("float", slow, 4 * elements),
            Option("static", slow * rng.uniform(0.2, 0.9), elements, static),
            Option("dynamic", slow * rng.uniform(0.3, 1.0), elements, dynamic),
            Option("weight-only", slow * rng.uniform(0.5, 1.1), elements // 2, packed),
        )
        stored, read = ((f"g{i}", "static"),), ((f"g{i + 1}", "static"),) if i + 1 < groups else ()
        cost = 10 ** rng.uniform(-0.5, 2)
        charges.append(Charge(f"quantize:v{i}", (Cause(read, stored),), cost))
        charges.append(Charge(f"dequantize:v{i}", (Cause(stored, read),), cost))
        charges.append(Charge(f"value:v{i}", (Cause((*stored, *read)),), noise={"y": 10 ** rng.uniform(-7, -3.5)}))
    return Problem(options, tuple(charges), ("y",))


@pytest.mark.parametrize(
    ("objective", "units"),
    [
        ("latency", {"noise:y0": "us per dB", "bytes": "us per kB", "bits": "us per bit"}),
        ("bytes", {"noise:y0": "kB per dB", "latency": "kB per us"}),
        ("noise", {"bytes": "dB per kB", "latency": "dB per us"}),
    ],
)
def test_a_price_is_what_the_relaxed_limit_wins(objective: str, units: dict[str, str]) -> None:
    problem = random_problem(5, groups=5)
    points = list(every(problem))
    middle = {name: sorted(p.amount(name) for p in points)[len(points) // 2] for name in units}
    bounds = {**middle, **({"bytes": int(middle["bytes"])} if "bytes" in middle else {})}
    limits = Limits(
        {n.removeprefix(NOISE): b for n, b in bounds.items() if n.startswith(NOISE)},
        bytes=int(bounds["bytes"]) if "bytes" in bounds else None,
        bits=bounds.get("bits"),
        latency_us=bounds.get("latency"),
    )
    value = value_of(problem, limits, objective)
    found = solve(problem, limits, objective)
    assert {name: price.unit for name, price in found.prices.items()} == units
    bought = 0
    for name, price in found.prices.items():
        step = {"latency": 0.05 * bounds[name], "bytes": 0.05 * bounds[name] / 1000, "bits": 0.1}.get(name, 1.0)
        assert price.step == pytest.approx(step)
        relaxed = bounds[name] * 10**0.1 if name.startswith(NOISE) else bounds[name] + step * _unit(name)
        held = {**bounds, name: relaxed}
        best = min(value(p) for p in points if all(p.amount(n) <= b for n, b in held.items()))
        if objective == "noise":
            won = decibels(best) - decibels(value(found))
        else:
            won = (value(found) - best) / _unit(objective)
        assert price.per_unit * price.step == pytest.approx(won, abs=1e-9)
        bought += won > 0
    assert bought, "a problem on which no limit binds tests nothing"


def _unit(name: str) -> float:
    return 1000.0 if name == "bytes" else 1.0


def test_a_price_is_readable_and_that_of_a_loose_limit_is_zero() -> None:
    found = solve(chain(6), Limits({"y": 5.65e-4}, bytes=10**6))
    # One dB more holds the sixth group (6.7e-4): it wins its 10 us.
    assert str(found.prices["noise:y"]) == "10 us per dB (over 1 dB)"
    assert str(found.prices["bytes"]) == "0 us per kB (over 50 kB)"


def test_the_error_names_the_limit_that_cannot_hold_and_the_nearest_point() -> None:
    with pytest.raises(InfeasibleError) as caught:
        solve(chain(2), Limits({"y": 1e-3}, bytes=100))
    error = caught.value
    assert error.limits == ("bytes",)
    assert error.least["bytes"] == 250.0
    assert (error.nearest.bytes, error.violation) == (250, 1.5)
    assert str(error) == (
        "bytes <= 0.100 kB cannot hold: the best of all plans has 0.250 kB; the nearest feasible point has "
        "36.38 dB at 'y', 0.250 kB, 35.00 us: relax the budgets to it"
    )


def test_limits_that_only_fail_together_are_named_together() -> None:
    with pytest.raises(InfeasibleError, match="cannot hold together") as caught:
        solve(chain(2), Limits({"y": 1e-4}, bytes=300, latency_us=1000.0))
    assert set(caught.value.limits) == {"noise:y", "bytes"}
    # All static: 2.3 times the noise; one static: 550 bytes, 1.83 times the size and 1.2 times the noise.
    assert caught.value.violation == pytest.approx(550 / 300 - 1)


def test_a_limit_met_with_equality_holds_and_one_ulp_less_does_not() -> None:
    problem = random_problem(11, groups=5)
    best = solve(problem, Limits(), "noise", prices=False)
    worst = max(best.noise, key=lambda name: best.noise[name])
    same = solve(problem, Limits({worst: best.noise[worst]}, bytes=best.bytes), prices=False)
    assert same.noise[worst] <= best.noise[worst]
    slightly = [p for p in every(problem) if p.noise[worst] < best.noise[worst]]
    if not slightly:
        with pytest.raises(InfeasibleError):
            solve(problem, Limits({worst: math.nextafter(best.noise[worst], 0.0)}), prices=False)


def test_the_example_of_the_documentation_is_as_it_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    code = page.partition("### An example of three groups")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    fast, accurate, problem = names["fast"], names["accurate"], names["problem"]
    assert (fast.cost_us, round(fast.worst_db, 1), set(fast.choice.values())) == (55.0, 31.0, {"static"})
    assert (accurate.cost_us, round(accurate.worst_db, 1)) == (63.0, 33.0)
    assert accurate.choice == {"conv1": "static", "conv2": "static", "head": "dynamic"}
    assert str(accurate.prices["noise:y"]) == "8 us per dB (over 1 dB)"
    with pytest.raises(InfeasibleError, match="cannot hold together") as caught:
        solve(problem, Limits({"y": 1e-4}, bytes=5800))
    assert caught.value.nearest.bytes == 10_100


def test_time_that_is_too_short_is_said() -> None:
    with pytest.raises(BudgetError, match="found no plan within 0 s"):
        solve(long_chain(30), Limits({"y": 2e-3}), settings=Settings(time_limit_s=0.0))


def test_decibels_and_powers() -> None:
    assert decibels(1e-3) == pytest.approx(30.0)
    assert decibels(0.0) == CEILING == decibels(1e-30)
    assert noise_power(30.0) == pytest.approx(1e-3)


@pytest.mark.skipif(os.name == "nt", reason="nothing is dropped on Windows")
def test_only_the_stray_lines_of_the_solver_are_dropped(capfd: pytest.CaptureFixture[str]) -> None:
    with without_stray_lines():
        # From C and not flushed, as the solver does; and from another thread, say.
        ctypes.CDLL(None).printf(b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        os.write(1, b"mine\n")
    ctypes.CDLL(None).fflush(None)
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "mine\nafter\n"

"""Solve the planner's problem: the best choice under limits, what each limit costs, or the nearest feasible point.

Ties are broken in this order: among choices of equal objective the fastest (objectives ``bytes`` and ``noise`` are
solved again for latency, with their optimum as a limit); then, group by group in the order of their names, an option
moves to one that is faster or, if as fast, less noisy, or smaller, or earlier among its group's options (float, by
convention), as long as every limit holds. Groups are sorted and the solver runs without randomness, so equal problems
give equal solutions, unless its time limit strikes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qcompiler.errors import BudgetError
from qcompiler.search.formulation import Formulation, Found, Settings, ratio
from qcompiler.search.polish import polish
from qcompiler.search.problem import Limits, Problem
from qcompiler.search.quality import decibels
from qcompiler.search.solution import (
    BITS,
    BYTES,
    LATENCY,
    NOISE,
    InfeasibleError,
    Point,
    Price,
    Solution,
    bounds_of,
    evaluate,
    noise_power,
)

__all__ = ["Settings", "evaluate", "solve"]

OBJECTIVES = ("latency", "bytes", "noise")
_NOTHING: Mapping[str, str] = MappingProxyType({})
_DEFAULT = Settings()
_UNITS = {LATENCY: "us", BYTES: "kB", BITS: "bit", NOISE: "dB"}


def solve(
    problem: Problem,
    limits: Limits,
    objective: str = LATENCY,
    pinned: Mapping[str, str] = _NOTHING,
    *,
    reference: Mapping[str, float] | None = None,
    prices: bool = True,
    settings: Settings = _DEFAULT,
) -> Solution:
    """Return the best choice of one option per group that holds all limits.

    Args:
        problem: options and charges.
        limits: upper bounds, held exactly.
        objective: ``latency`` (us), ``bytes``, or ``noise``: the largest ratio of noise to a reference over outputs.
        pinned: groups whose option is given.
        reference: for ``noise``: relative noise power per output to compare with; by default the limit of that
            output, 1 where there is none.
        prices: whether to find what relaxing each limit buys (one more solve per limit).
        settings: time limit and gap.

    Raises:
        InfeasibleError: no choice holds the limits (a `BudgetError`, with the nearest feasible point).
        BudgetError: an unknown objective, group, option or output, or no choice found within the time limit.
    """
    if objective not in OBJECTIVES:
        raise BudgetError(f"cannot minimise {objective!r}; expected one of {', '.join(OBJECTIVES)}")
    for output in (*limits.noise, *(reference or ())):
        if output not in problem.outputs:
            raise BudgetError(f"a noise limit names {output!r}, which is none of the outputs {problem.outputs}")
    program = Formulation(problem, pinned, settings)
    bounds = bounds_of(limits)
    references = {NOISE + o: (reference or {}).get(o, limits.noise.get(o, 1.0)) for o in problem.outputs}
    found = _least(program, objective, references, bounds)
    if found is None:
        raise _infeasible(program, objective, references, bounds)
    point = _settled(program, objective, references, bounds, found)
    reached = _reached(point, objective, references)
    gap = max(0.0, reached - found.bound) / abs(reached) if reached else 0.0
    return Solution(
        **vars(point),
        objective=objective,
        gap=gap if gap > 1e-9 else 0.0,
        prices=_prices(program, objective, references, bounds, reached) if prices else {},
    )


def _least(
    program: Formulation, objective: str, references: Mapping[str, float], bounds: Mapping[str, float]
) -> Found | None:
    if objective == "noise":
        return program.least_ratio(references, bounds)
    return program.least(objective, bounds)


def _reached(point: Point, objective: str, references: Mapping[str, float]) -> float:
    return ratio(point, references) if objective == "noise" else point.amount(objective)


def _settled(
    program: Formulation, objective: str, references: Mapping[str, float], bounds: Mapping[str, float], found: Found
) -> Point:
    """Break ties: the fastest choice of equal objective, then the less noisy, smaller and earlier options."""
    best, held = found.point, dict(bounds)
    if objective != LATENCY:
        least = _reached(best, objective, references)
        tops = {BYTES: least} if objective == BYTES else {n: r * least for n, r in references.items()}
        for name, top in tops.items():
            # A product may round below the very value that it stands for.
            held[name] = min(held.get(name, float("inf")), max(top, best.amount(name)))
        fastest = program.least(LATENCY, held)
        if fastest is not None and fastest.point.cost_us < best.cost_us:
            best = fastest.point
    return polish(program.problem, best, held, program.free)


def _infeasible(
    program: Formulation, objective: str, references: Mapping[str, float], bounds: Mapping[str, float]
) -> InfeasibleError:
    """Find which limits cannot hold, and the choice that misses them least."""
    least: dict[str, float] = {}
    for name in bounds:
        alone = program.least(name, {})
        assert alone is not None, "without bounds any choice is feasible"
        least[name] = alone.point.amount(name)
    culprits = tuple(name for name, bound in bounds.items() if least[name] > bound)
    if not culprits:
        # No limit fails by itself: drop each that is not needed for the conflict.
        needed = dict(bounds)
        for name in bounds:
            fewer = {n: b for n, b in needed.items() if n != name}
            if not program.possible(fewer):
                needed = fewer
        culprits = tuple(needed)
    nearest = program.least_ratio(bounds, {})
    assert nearest is not None
    worst = ratio(nearest.point, bounds)
    relaxed = {name: max(bound * worst, nearest.point.amount(name)) for name, bound in bounds.items()}
    for name, bound in bounds.items():
        # Limits that need not give way for the same violation of the others stay.
        if program.possible({**relaxed, name: bound}):
            relaxed[name] = bound
    found = _least(program, objective, references, relaxed)
    point = nearest.point if found is None else _settled(program, objective, references, relaxed, found)
    return InfeasibleError(culprits, bounds, point, least)


def _prices(
    program: Formulation,
    objective: str,
    references: Mapping[str, float],
    bounds: Mapping[str, float],
    reached: float,
) -> dict[str, Price]:
    """Solve once more per limit, with that limit relaxed by a step."""
    made = {}
    for name, bound in bounds.items():
        step, relaxed = _relaxed(name, bound)
        found = _least(program, objective, references, {**bounds, name: relaxed})
        assert found is not None, "a relaxed program is feasible where the strict one is"
        after = _reached(found.point, objective, references)
        gain = max(0.0, _in_units(objective, reached, after))
        unit = _UNITS[NOISE if name.startswith(NOISE) else name]
        made[name] = Price(gain / step, f"{_UNITS[_unit_key(objective)]} per {unit}", step)
    return made


def _relaxed(name: str, bound: float) -> tuple[float, float]:
    """Return a step in the units of a limit, and the limit relaxed by it: 1 dB, 0.1 bit, 5 % of bytes or latency."""
    if name.startswith(NOISE):
        return 1.0, bound / noise_power(1.0)
    if name == BITS:
        return 0.1, bound + 0.1
    step = 0.05 * bound
    return (step / 1000.0 if name == BYTES else step), bound + step


def _unit_key(objective: str) -> str:
    return NOISE if objective == "noise" else objective


def _in_units(objective: str, before: float, after: float) -> float:
    """Return what was won between two values of the objective, in us, kB or dB."""
    if objective == "noise":
        return decibels(after) - decibels(before)
    return (before - after) / (1000.0 if objective == BYTES else 1.0)

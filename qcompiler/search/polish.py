"""Break ties of a solved choice by exact arithmetic, option by option."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from qcompiler.search.problem import Charge, Option, Problem
from qcompiler.search.solution import Point, evaluate, holds

_ROUNDS = 4
"""Passes over all groups; each only ever improves, and one is enough unless moves enable each other."""


def polish(problem: Problem, point: Point, bounds: Mapping[str, float], free: frozenset[str]) -> Point:
    """Move groups to options that are no slower and less noisy, smaller or earlier, while every bound holds.

    Args:
        problem: options and charges.
        point: where to start.
        bounds: upper bounds by the names of `Point.amount`.
        free: groups that may move.
    """
    touching: dict[str, list[Charge]] = defaultdict(list)
    for charge in problem.charges:
        for group in dict.fromkeys(g for c in charge.causes for g, _ in (*c.asked, *c.unless)):
            touching[group].append(charge)
    for _ in range(_ROUNDS):
        start = point
        for group in sorted(free):
            for place, option in enumerate(problem.options[group]):
                if not _better(problem, point.choice, group, place, touching[group]):
                    continue
                trial = evaluate(problem, {**point.choice, group: option.name})
                if all(trial.amount(name) <= bound for name, bound in bounds.items()):
                    point = trial
        if point is start:
            break
    return point


def _better(problem: Problem, choice: Mapping[str, str], group: str, place: int, charges: list[Charge]) -> bool:
    """Return whether moving one group is an improvement by (time, noise, bytes, place), compared in that order."""
    options = problem.options[group]
    current = next(i for i, o in enumerate(options) if o.name == choice[group])
    if place == current:
        return False
    after = {**choice, group: options[place].name}
    plus: list[Option | Charge] = [options[place], *(c for c in charges if _paid(c, after))]
    minus: list[Option | Charge] = [options[current], *(c for c in charges if _paid(c, choice))]
    changes = (
        math.fsum([*(p.cost for p in plus), *(-m.cost for m in minus)]),
        math.fsum([*(v for p in plus for v in p.noise.values()), *(-v for m in minus for v in m.noise.values())]),
        sum(p.bytes for p in plus) - sum(m.bytes for m in minus),
        place - current,
    )
    return next((change < 0 for change in changes if change != 0), False)


def _paid(charge: Charge, choice: Mapping[str, str]) -> bool:
    return any(holds(cause, choice) for cause in charge.causes)

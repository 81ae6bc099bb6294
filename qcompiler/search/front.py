"""Pareto fronts: what accuracy and size cost in time, and where to stop buying."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from qcompiler.search.formulation import Settings
from qcompiler.search.problem import Limits, Problem
from qcompiler.search.program import solve
from qcompiler.search.quality import CEILING
from qcompiler.search.solution import BYTES, LATENCY, Point, Solution, evaluate, noise_power

Against = Literal["noise", "bytes"]

TOP_DB = 60.0
"""Highest SQNR in dB that a front is swept to."""
_LEAST_GAIN_DB = 0.05
"""Gains below this are within what SQNR measures."""
_LEAST_PERCENT = 0.2
"""What costs less than this share of latency, in percent, counts as this."""
_NOTHING: Mapping[str, str] = MappingProxyType({})
_SWEEP = Settings(gap=1e-6)


@dataclass(frozen=True)
class Front:
    """Choices of which none is both faster and better than another.

    Attributes:
        against: ``noise`` (the least SQNR over the outputs) or ``bytes``.
        points: the choices, fastest first; each costs more time and has less noise, or fewer bytes, than the one
            before.
        all_float: the choice with every group in float, or pinned.
    """

    against: Against
    points: tuple[Solution, ...]
    all_float: Point


def front(
    problem: Problem,
    limits: Limits,
    against: Against = "noise",
    pinned: Mapping[str, str] = _NOTHING,
    *,
    steps: int = 24,
    top_db: float = TOP_DB,
    settings: Settings = _SWEEP,
) -> Front:
    """Sweep one limit from what the fastest choice has to the least possible, and solve for latency at each step.

    Args:
        problem: options and charges.
        limits: bounds that every point holds.
        against: what latency is weighed against. ``noise`` bounds all outputs alike, in equal steps of dB; ``bytes``
            in equal steps of bytes.
        pinned: groups whose option is given.
        steps: how many limits to try; steps that the point before holds already are not solved again.
        top_db: highest SQNR in dB to sweep to.
        settings: of the solver.

    Raises:
        InfeasibleError: no choice holds the limits.
    """

    def least(objective: str, bound: Limits) -> Solution:
        return solve(problem, bound, objective, pinned, prices=False, settings=settings)

    fastest = least(LATENCY, limits)
    if against == "noise":
        flat = dict.fromkeys(problem.outputs, 1.0)
        best = solve(problem, limits, "noise", pinned, reference=flat, prices=False, settings=settings)
        found = _sweep_noise(problem, limits, least, fastest, best, steps, top_db)
    else:
        best = least(BYTES, limits)
        found = _sweep_bytes(limits, least, fastest, best, steps)
    return Front(against, _undominated(found, against), evaluate(problem, all_float(problem, pinned)))


def all_float(problem: Problem, pinned: Mapping[str, str] = _NOTHING) -> dict[str, str]:
    """Return the choice of ``float``, or of the first option where a group has no float, but for pinned groups."""
    names = {group: [o.name for o in options] for group, options in problem.options.items()}
    return {g: pinned.get(g, "float" if "float" in names[g] else names[g][0]) for g in names}


Least = Callable[[str, Limits], Solution]


def _sweep_noise(
    problem: Problem, limits: Limits, least: Least, fastest: Solution, best: Solution, steps: int, top_db: float
) -> list[Solution]:
    """Raise the least SQNR step by step; the best that any choice reaches closes the front."""
    found = [fastest]
    top = min(best.worst_db, top_db)
    bottom = fastest.worst_db
    for number in range(1, steps):
        level = bottom + (top - bottom) * number / steps
        if level <= found[-1].worst_db:
            continue
        power = noise_power(level)
        noise = {name: min(power, limits.noise.get(name, power)) for name in problem.outputs}
        found.append(least(LATENCY, replace(limits, noise=noise)))
    return [*found, best]


def _sweep_bytes(limits: Limits, least: Least, fastest: Solution, best: Solution, steps: int) -> list[Solution]:
    """Lower the bytes step by step."""
    found = [fastest]
    for number in range(1, steps):
        level = fastest.bytes + math.floor((best.bytes - fastest.bytes) * number / steps)
        if best.bytes < level < found[-1].bytes:
            found.append(least(LATENCY, replace(limits, bytes=level)))
    return [*found, best]


def _undominated(found: list[Solution], against: Against) -> tuple[Solution, ...]:
    """Return the points of which none is faster and no worse, fastest first."""

    def badness(point: Solution) -> float:
        return float(point.bytes) if against == BYTES else -point.worst_db

    kept: list[Solution] = []
    for point in sorted(found, key=lambda p: (p.cost_us, badness(p))):
        if not kept or badness(point) < badness(kept[-1]):
            kept.append(point)
    return tuple(kept)


def choose_knee(swept: Front, db_per_percent: float = 0.3, comfort_db: float = 30.0, share: float = 0.2) -> Solution:
    """Return the point to take: past the demanded bound, accuracy is bought only while it is cheap.

    The start is the fastest point (it holds the limits). From where it stands, the rule steps to the slower point that
    buys the most dB per percent of latency, as long as that is at least ``db_per_percent``. Gains above ``comfort_db``
    count for nothing, a step below 0.2 % counts as 0.2 %, and gains below 0.05 dB are none.

    Args:
        swept: a front against noise.
        db_per_percent: least gain in dB per percent of latency.
        comfort_db: SQNR in dB above which nothing more is bought.
        share: largest share of the gain in speed over all-float (of the fastest point) that may be spent.
    """
    here, *rest = swept.points
    ceiling = here.cost_us + share * max(0.0, swept.all_float.cost_us - here.cost_us)

    def gain(point: Solution) -> float:
        return min(point.worst_db, comfort_db, CEILING) - here.worst_db

    def worth(point: Solution) -> float:
        percent = 100.0 * (point.cost_us - here.cost_us) / here.cost_us if here.cost_us > 0 else 0.0
        return gain(point) / max(percent, _LEAST_PERCENT)

    while here.worst_db < comfort_db:
        rest = [p for p in rest if p.worst_db > here.worst_db and p.cost_us <= ceiling and gain(p) >= _LEAST_GAIN_DB]
        step = max(rest, key=worth, default=None)
        if step is None or worth(step) < db_per_percent:
            break
        here = step
    return here

"""What the planner answers: a choice, what it costs, how far from the optimum it can be, and what each budget costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qcompiler.errors import BudgetError
from qcompiler.search.problem import Cause, Charge, Limits, Option, Problem
from qcompiler.search.quality import CEILING, decibels

LATENCY, BYTES, BITS = "latency", "bytes", "bits"
NOISE = "noise:"
"""Prefix of the name of a limit on the noise at one output: ``noise:OUTPUT``."""


def noise_power(sqnr_db: float) -> float:
    """Return the relative noise power (error power / signal power) of an SQNR in dB."""
    return float(10.0 ** (-sqnr_db / 10.0))


@dataclass(frozen=True)
class Point:
    """One choice and what it adds up to.

    Attributes:
        choice: option per group.
        cost_us: microseconds per run, fixed cost included.
        bytes: bytes, fixed bytes included.
        bits: stored bits per weight, averaged; 0 if the problem counts no weights.
        noise: relative noise power per output.
        paid: names of the charges that the choice incurs.
    """

    choice: Mapping[str, str]
    cost_us: float
    bytes: int
    bits: float
    noise: Mapping[str, float]
    paid: tuple[str, ...] = ()

    @property
    def sqnr_db(self) -> dict[str, float]:
        """Return the SQNR per output in dB."""
        return {name: decibels(power) for name, power in self.noise.items()}

    @property
    def worst_db(self) -> float:
        """Return the least SQNR over the outputs in dB."""
        return min(self.sqnr_db.values(), default=CEILING)

    def amount(self, name: str) -> float:
        """Return what is bounded under a name: ``latency`` (us), ``bytes``, ``bits`` or ``noise:OUTPUT`` (power)."""
        if name.startswith(NOISE):
            return self.noise[name.removeprefix(NOISE)]
        return {LATENCY: self.cost_us, BYTES: float(self.bytes), BITS: self.bits}[name]


def evaluate(problem: Problem, choice: Mapping[str, str]) -> Point:
    """Add up a choice exactly: sums are rounded once, so their order does not matter.

    Raises:
        BudgetError: a group without a choice, or an option that it does not have.
    """
    chosen = []
    for group, options in problem.options.items():
        found = [o for o in options if o.name == choice.get(group)]
        if not found:
            names = ", ".join(o.name for o in options)
            raise BudgetError(f"group {group!r} has no option {choice.get(group)!r}; expected one of {names}")
        chosen.append(found[0])
    paid = [c for c in problem.charges if any(holds(cause, choice) for cause in c.causes)]
    parts: list[Option | Charge] = [*chosen, *paid]
    return Point(
        choice={group: choice[group] for group in problem.options},
        cost_us=math.fsum([problem.fixed_cost, *(p.cost for p in parts)]),
        bytes=problem.fixed_bytes + sum(p.bytes for p in parts),
        bits=math.fsum(p.bits for p in parts) / problem.weights if problem.weights else 0.0,
        noise={name: math.fsum(p.noise.get(name, 0.0) for p in parts) for name in problem.outputs},
        paid=tuple(c.name for c in paid),
    )


def holds(cause: Cause, choice: Mapping[str, str]) -> bool:
    """Return whether a choice gives a cause: any of what it asks for, none of what excuses it."""
    asked = any(choice.get(group) == option for group, option in cause.asked)
    return asked and not any(choice.get(group) == option for group, option in cause.unless)


def bounds_of(limits: Limits) -> dict[str, float]:
    """Return the limits that are set, by the names of `Point.amount`."""
    given = {NOISE + output: power for output, power in limits.noise.items()}
    others = {BYTES: limits.bytes, BITS: limits.bits, LATENCY: limits.latency_us}
    return given | {name: float(bound) for name, bound in others.items() if bound is not None}


def shown(name: str, amount: float) -> str:
    """Return an amount for a reader: ``26.30 dB at 'y'``, ``4.65 bits per weight``, ``812.000 kB``, ``3.10 us``."""
    if name.startswith(NOISE):
        return f"{decibels(amount):.2f} dB at {name.removeprefix(NOISE)!r}"
    if name == BYTES:
        return f"{amount / 1000:.3f} kB"
    return f"{amount:.4g} bits per weight" if name == BITS else f"{amount:.2f} us"


@dataclass(frozen=True)
class Price:
    """What relaxing one limit buys.

    Found by solving again with the limit relaxed by ``step`` units: what was won, per unit. An integer program wins in
    jumps, so a price holds over its step, not for one unit alone.

    Attributes:
        per_unit: gain in the objective per unit of the limit; 0 for a limit that does not bind.
        unit: such as ``us per dB``, ``us per kB``, ``kB per dB`` or ``dB per us``.
        step: by how many units the limit was relaxed.
    """

    per_unit: float
    unit: str
    step: float

    def __str__(self) -> str:
        limit = self.unit.rpartition(" per ")[2]
        return f"{self.per_unit:.3g} {self.unit} (over {self.step:.3g} {limit})"


@dataclass(frozen=True)
class Solution(Point):
    """An optimal choice.

    Attributes:
        objective: ``latency``, ``bytes`` or ``noise``.
        gap: by which share of the objective a better choice could at most be better; 0 if proven optimal.
        prices: per limit (by the names of `Point.amount`) what relaxing it buys.
    """

    objective: str = LATENCY
    gap: float = 0.0
    prices: Mapping[str, Price] = field(default_factory=dict)


class InfeasibleError(BudgetError):
    """Limits that no choice can hold.

    Attributes:
        limits: names, as `Point.amount` takes them, of the limits that cannot hold: each that fails by itself, or a
            smallest set of those that fail together.
        nearest: the choice with the least largest relative violation (value / limit - 1, noise as power).
        violation: that violation.
        least: per limit the least value that any choice reaches when nothing else is bounded.
    """

    def __init__(
        self, limits: tuple[str, ...], bounds: Mapping[str, float], nearest: Point, least: Mapping[str, float]
    ) -> None:
        self.limits, self.nearest, self.least = limits, nearest, dict(least)
        self.violation = max(nearest.amount(name) / bound - 1.0 for name, bound in bounds.items())
        alone = [name for name in limits if least[name] > bounds[name]]
        if alone:
            why = "; ".join(
                f"{_asked(name, bounds[name])} cannot hold: the best of all plans has {shown(name, least[name])}"
                for name in alone
            )
        else:
            why = f"{' and '.join(_asked(name, bounds[name]) for name in limits)} cannot hold together"
        told = dict.fromkeys((*bounds, LATENCY, *([BYTES] if nearest.bytes else [])))
        reached = ", ".join(shown(name, nearest.amount(name)) for name in told)
        super().__init__(f"{why}; the nearest feasible point has {reached}: relax the budgets to it")


def _asked(name: str, bound: float) -> str:
    sign = ">=" if name.startswith(NOISE) else "<="
    kind = "sqnr" if name.startswith(NOISE) else name
    return f"{kind} {sign} {shown(name, bound)}"

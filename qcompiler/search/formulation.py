"""The planner's problem as rows of an integer program, solved by HiGHS.

Variables: ``x[group, option]`` in {0, 1}, one of each group is 1; per charge ``z`` in [0, 1], with one row per cause
and group that it asks for: ``z >= sum(asked of the group) - sum(unless)``. Since a group takes one option only, that
row is tighter than a row per option, and there are fewer. Costs are not negative, so each z settles at 0 or 1.

Numbers span many orders (noise powers 1e-8 to 1), the solver's tolerances are absolute. So every bounded row is shifted
by the least that each group must contribute, options that alone break a bound are removed, and what remains is scaled
to the room that is left: a violation below the tolerance is one of 1e-9 of that room. What the solver returns is added
up again exactly; a choice that breaks a bound nevertheless is cut off, and the program is solved again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from qcompiler.errors import BudgetError
from qcompiler.search.problem import Charge, Key, Option, Problem
from qcompiler.search.solution import BITS, BYTES, LATENCY, NOISE, Point, evaluate
from qcompiler.search.solver_output import without_stray_lines

Vector = npt.NDArray[np.float64]

_ROOM = 1e3
"""Right-hand side of a scaled row: HiGHS's tolerance of 1e-6 is then 1e-9 of the room."""
_SPREAD = 1e5
"""Spread of a scaled objective: HiGHS's absolute gap of 1e-6 is then 1e-11 of it."""
_ROUNDING = 1e-12
"""Relative error that sums of doubles may carry."""
_CUTS = 8
"""Choices that are cut off one by one before the rows are tightened as well."""


@dataclass(frozen=True)
class Settings:
    """How long and how well to solve.

    Attributes:
        time_limit_s: seconds per solve. Where it strikes, the answer depends on the machine's speed; its gap says so.
        gap: relative gap at which the solver stops.
    """

    time_limit_s: float = 60.0
    gap: float = 1e-9


@dataclass(frozen=True)
class Measure:
    """One linear quantity: what each option (column of x) and each charge adds, and a constant."""

    options: Vector
    charges: Vector
    fixed: float


@dataclass(frozen=True)
class Found:
    """A choice, and a lower bound on the objective of every other."""

    point: Point
    bound: float


@dataclass(frozen=True)
class _Row:
    """One inequality of a single solve: ``x`` and ``charges`` coefficients, that of the free variable, upper bound."""

    options: Vector
    charges: Vector
    free: float
    upper: float


class Formulation:
    """A problem in columns and rows. Groups are sorted by name, so that equal problems give equal programs."""

    def __init__(self, problem: Problem, pinned: Mapping[str, str], settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.groups = sorted(problem.options)
        self.keys: list[Key] = [(g, o.name) for g in self.groups for o in problem.options[g]]
        self.column = {key: place for place, key in enumerate(self.keys)}
        self.first = np.cumsum([0, *(len(problem.options[g]) for g in self.groups)])
        self.allowed = np.ones(len(self.keys), bool)
        self.pinned = frozenset(pinned)
        self._pin(pinned)
        self.measures = self._measures()
        self.structure, self.structure_bounds = self._structure()

    @property
    def free(self) -> frozenset[str]:
        """Return the groups that are not pinned."""
        return frozenset(self.groups) - self.pinned

    def _pin(self, pinned: Mapping[str, str]) -> None:
        for group, option in pinned.items():
            if group not in self.problem.options:
                raise BudgetError(f"pinned group {group!r} is not among the {len(self.groups)} groups of the problem")
            if (group, option) not in self.column:
                names = ", ".join(o.name for o in self.problem.options[group])
                raise BudgetError(f"group {group!r} is pinned to {option!r}; expected one of {names}")
            for other in self.problem.options[group]:
                self.allowed[self.column[group, other.name]] = other.name == option

    def _measures(self) -> dict[str, Measure]:
        problem = self.problem
        options: list[Option] = [o for g in self.groups for o in problem.options[g]]
        charges: Sequence[Charge] = problem.charges
        weights = max(1, problem.weights)

        def vector(numbers: Sequence[float]) -> Vector:
            return np.asarray(numbers, np.float64)

        made = {
            LATENCY: Measure(vector([o.cost for o in options]), vector([c.cost for c in charges]), problem.fixed_cost),
            BYTES: Measure(
                vector([o.bytes for o in options]), vector([c.bytes for c in charges]), float(problem.fixed_bytes)
            ),
            BITS: Measure(
                vector([o.bits / weights for o in options]), vector([c.bits / weights for c in charges]), 0.0
            ),
        }
        for name in problem.outputs:
            powers = vector([o.noise.get(name, 0.0) for o in options])
            made[NOISE + name] = Measure(powers, vector([c.noise.get(name, 0.0) for c in charges]), 0.0)
        return made

    def _structure(self) -> tuple[coo_array, tuple[Vector, Vector]]:
        """Return the rows that every solve shares: one option per group, and the causes of the charges."""
        cells: list[tuple[int, int, float]] = []
        lower: list[float] = []
        upper: list[float] = []
        for place in range(len(self.groups)):
            cells += [(len(lower), column, 1.0) for column in range(self.first[place], self.first[place + 1])]
            lower.append(1.0)
            upper.append(1.0)
        for number, charge in enumerate(self.problem.charges):
            for asked, unless in self._causes(charge):
                row = len(lower)
                cells.append((row, len(self.keys) + number, 1.0))
                cells += [(row, self.column[key], -1.0) for key in asked]
                cells += [(row, self.column[key], 1.0) for key in unless]
                lower.append(0.0)
                upper.append(np.inf)
        rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
        shape = (len(lower), len(self.keys) + len(self.problem.charges) + 1)
        matrix = coo_array((values, (rows, columns)), shape=shape)
        return matrix, (np.asarray(lower, np.float64), np.asarray(upper, np.float64))

    def _causes(self, charge: Charge) -> list[tuple[list[Key], list[Key]]]:
        """Return one (asked, unless) per row of a charge."""
        rows = []
        for cause in charge.causes:
            excused = set(cause.unless)
            for group in dict.fromkeys(g for g, _ in cause.asked):
                asked = [k for k in dict.fromkeys(cause.asked) if k[0] == group and k not in excused]
                # Another option of the same group is not chosen when this one is: it excuses nothing.
                unless = [k for k in dict.fromkeys(cause.unless) if k[0] != group]
                if asked:
                    rows.append((asked, unless))
        return rows

    def possible(self, bounds: Mapping[str, float]) -> bool:
        """Return whether any choice holds all bounds."""
        room = self._prune(bounds)
        if room is None:
            return False
        rows = [self._row(name, bound, room[0]) for name, bound in bounds.items()]
        nothing = np.zeros(len(self.keys) + len(self.problem.charges) + 1)
        return self._solve(nothing, rows, *room, bounds) is not None

    def least(self, name: str, bounds: Mapping[str, float]) -> Found | None:
        """Return the choice with the least amount of one measure that holds all bounds exactly; None if none does.

        Args:
            name: the measure, as `Point.amount` names it.
            bounds: upper bounds by the same names.

        Raises:
            BudgetError: the time limit struck before any choice was found.
        """
        room = self._prune(bounds)
        if room is None:
            return None
        allowed, charged = room
        rows = [self._row(bound_name, bound, allowed) for bound_name, bound in bounds.items()]
        measure = self.measures[name]
        base, options = self._shift(measure, allowed)
        spread = float(options[allowed].sum() + measure.charges[charged].sum())
        scale = _SPREAD / spread if spread > 0 else 1.0
        objective = np.concatenate([options, measure.charges, [0.0]]) * scale
        answer = self._solve(objective, rows, allowed, charged, bounds)
        return None if answer is None else Found(answer[0], answer[1] / scale + base)

    def least_ratio(self, references: Mapping[str, float], bounds: Mapping[str, float]) -> Found | None:
        """Return the choice whose largest ratio of measure to reference is least; ``bound`` bounds that ratio.

        The scale of the ratio is not known beforehand, so the program is solved again, scaled to the ratio found, until
        that no longer halves.
        """
        found = self.least(LATENCY, bounds)
        if found is None or not references:
            return found
        best, bound = found.point, 0.0
        while (ceiling := ratio(best, references)) > 0:
            answer = self._ratio_below(ceiling, references, bounds)
            if answer is None:
                break
            point, part = answer
            bound = max(bound, part * ceiling)
            if ratio(point, references) < ceiling:
                best = point
            if ratio(best, references) > 0.5 * ceiling:
                break
        return Found(best, min(bound, ratio(best, references)))

    def _ratio_below(
        self, ceiling: float, references: Mapping[str, float], bounds: Mapping[str, float]
    ) -> tuple[Point, float] | None:
        """Minimise the largest ratio as a share of a ceiling that some choice is known to reach."""
        most = {name: reference * ceiling for name, reference in references.items()}
        room = self._prune({**most, **{n: min(b, most.get(n, b)) for n, b in bounds.items()}})
        if room is None:
            return None
        allowed, charged = room
        rows = [self._row(name, bound, allowed) for name, bound in bounds.items()]
        for name, top in most.items():
            base, options = self._shift(self.measures[name], allowed)
            scale = _ROOM / top
            rows.append(_Row(options * scale, self.measures[name].charges * scale, -_ROOM, -base * scale))
        objective = np.zeros(len(self.keys) + len(self.problem.charges) + 1)
        objective[-1] = _SPREAD
        answer = self._solve(objective, rows, allowed, charged, bounds)
        return None if answer is None else (answer[0], answer[1] / _SPREAD)

    def _shift(self, measure: Measure, allowed: npt.NDArray[np.bool_]) -> tuple[float, Vector]:
        """Return the least that all groups must contribute, the constant included, and what options add to it."""
        parts = [measure.fixed]
        options = np.zeros(len(self.keys))
        for place in range(len(self.groups)):
            span = slice(self.first[place], self.first[place + 1])
            least = float(measure.options[span][allowed[span]].min())
            parts.append(least)
            options[span] = np.where(allowed[span], measure.options[span] - least, 0.0)
        return math.fsum(parts), options

    def _prune(self, bounds: Mapping[str, float]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None:
        """Remove options and charges that alone break a bound; return what is left, None if a bound cannot hold."""
        allowed, charged = self.allowed.copy(), np.ones(len(self.problem.charges), bool)
        before = -1
        while before != allowed.sum():
            before = int(allowed.sum())
            for name, bound in bounds.items():
                base, options = self._shift(self.measures[name], allowed)
                slack = self._slack(bound, base)
                if slack < 0:
                    return None
                allowed &= options <= slack
                charged &= self.measures[name].charges <= slack
        return allowed, charged

    def _row(self, name: str, bound: float, allowed: npt.NDArray[np.bool_]) -> _Row:
        base, options = self._shift(self.measures[name], allowed)
        slack = self._slack(bound, base)
        scale = _ROOM / (max(slack, 1e-9 * abs(bound)) or 1.0)  # no room at all: what is left adds nothing
        return _Row(options * scale, self.measures[name].charges * scale, 0.0, slack * scale)

    def _slack(self, bound: float, base: float) -> float:
        """Return the room that a bound leaves, rounding errors allowed for: exactness is checked on the choice."""
        return bound - base + _ROUNDING * max(abs(bound), abs(base))

    def _solve(
        self,
        objective: Vector,
        rows: Sequence[_Row],
        allowed: npt.NDArray[np.bool_],
        charged: npt.NDArray[np.bool_],
        bounds: Mapping[str, float],
    ) -> tuple[Point, float] | None:
        """Solve until the bounds hold exactly; return the choice and the bound on the scaled objective."""
        cuts: list[_Row] = []
        tightened = 0.0
        while tightened < 1.0:
            extra = [_Row(r.options, r.charges, r.free, r.upper - abs(r.upper) * tightened) for r in rows] + cuts
            answer = self._run(objective, extra, allowed, charged)
            if answer is None:
                return None
            point = evaluate(self.problem, self._choice(answer[0], allowed))
            if all(point.amount(name) <= bound for name, bound in bounds.items()):
                return point, answer[1]
            taken = np.asarray([float(point.choice[g] == o) for g, o in self.keys])
            cuts.append(_Row(taken, np.zeros(len(self.problem.charges)), 0.0, len(self.groups) - 1.0))
            if len(cuts) > _CUTS:
                tightened = max(1e-9, 2 * tightened)
        return None

    def _run(
        self,
        objective: Vector,
        rows: Sequence[_Row],
        allowed: npt.NDArray[np.bool_],
        charged: npt.NDArray[np.bool_],
    ) -> tuple[Vector, float] | None:
        """Hand one program to HiGHS; return x and the dual bound, None if it is infeasible."""
        upper = np.concatenate([allowed, charged, [1.0]]).astype(np.float64)
        integral = np.concatenate([np.ones(len(self.keys)), np.zeros(len(self.problem.charges) + 1)])
        constraints = [LinearConstraint(self.structure.tocsr(), *self.structure_bounds)]
        if rows:
            width = len(self.keys)
            dense = np.asarray([np.concatenate([r.options * allowed, r.charges * charged, [r.free]]) for r in rows])
            assert dense.shape[1] == width + len(self.problem.charges) + 1
            constraints.append(LinearConstraint(coo_array(dense).tocsr(), -np.inf, [r.upper for r in rows]))
        options = {"time_limit": self.settings.time_limit_s, "mip_rel_gap": self.settings.gap, "disp": False}
        with without_stray_lines():
            result = milp(
                objective, integrality=integral, bounds=Bounds(0.0, upper), constraints=constraints, options=options
            )
        if result.x is None:
            if result.status == 2:
                return None
            raise BudgetError(
                f"the solver found no plan within {self.settings.time_limit_s:g} s ({result.message.strip()}); "
                "allow more time, or pin some groups"
            )
        bound = float(result.mip_dual_bound) if result.mip_dual_bound is not None else float(result.fun)
        return np.asarray(result.x[: len(self.keys)]), bound

    def _choice(self, x: Vector, allowed: npt.NDArray[np.bool_]) -> dict[str, str]:
        """Return the option per group that the solver's floats mean."""
        choice = {}
        for place, group in enumerate(self.groups):
            span = slice(self.first[place], self.first[place + 1])
            best = int(np.argmax(np.where(allowed[span], x[span], -1.0)))
            choice[group] = self.keys[self.first[place] + best][1]
        return choice


def ratio(point: Point, references: Mapping[str, float]) -> float:
    """Return the largest ratio of an amount to its reference."""
    return max((point.amount(name) / reference for name, reference in references.items()), default=0.0)

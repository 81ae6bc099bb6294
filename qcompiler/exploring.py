"""What accuracy and size cost in time: the Pareto fronts of a model, and the build of any point on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qcompiler.compilation import Compilation
from qcompiler.compiled import CompiledModel
from qcompiler.errors import BudgetError, CalibrationError
from qcompiler.options import ModelSource, Options
from qcompiler.planning import fill_sizes, fill_tables, measure_table
from qcompiler.quant.plan import Form
from qcompiler.search.accuracy import Terms
from qcompiler.search.front import Against, Front, choose_knee, front
from qcompiler.search.problem import Limits
from qcompiler.search.quality import CEILING
from qcompiler.search.solution import Point, noise_power

FRONTS: tuple[Against, ...] = ("noise", "bytes")
_TERMS = Terms()


@dataclass(frozen=True)
class Exploration:
    """The fronts of one model.

    Attributes:
        fronts: one for each thing that latency was weighed against.
        points: the points of all fronts, each choice once: fastest first.
        chosen: the point that `qcompiler compile` would start from.
        float_point: everything in float.
        warnings: what a user should know.
        measured: whether costs were timed on this machine.
    """

    fronts: tuple[Front, ...]
    points: tuple[Point, ...]
    chosen: Point
    float_point: Point
    warnings: tuple[str, ...]
    measured: bool

    def row(self, number: int) -> dict[str, Any]:
        """Return the figures of a point by its number, from 1."""
        point = self.points[number - 1]
        counts: dict[str, int] = {}
        for form in point.choice.values():
            counts[form] = counts.get(form, 0) + 1
        return {
            "number": number,
            "latency_us": round(point.cost_us, 2),
            "speedup": round(self.float_point.cost_us / point.cost_us, 3) if point.cost_us > 0 else None,
            "sqnr_db": None if point.worst_db >= CEILING else round(point.worst_db, 2),
            "bytes": point.bytes,
            "bits": round(point.bits, 3),
            "fronts": [f.against for f in self.fronts if any(p.choice == point.choice for p in f.points)],
            "chosen": point.choice == self.chosen.choice,
            "forms": dict(sorted(counts.items())),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready data: a row per point, with its form per group."""
        rows = [
            self.row(n) | {"choice": {g: f for g, f in point.choice.items() if f != "float"}}
            for n, point in enumerate(self.points, 1)
        ]
        plain = {"latency_us": round(self.float_point.cost_us, 2), "bytes": self.float_point.bytes}
        return {"points": rows, "float": plain, "measured": self.measured, "warnings": list(self.warnings)}


class Explorer:
    """Explore one model, and build points of its fronts.

    Attributes:
        compilation: the preparation that `qcompiler compile` would make.
        planning: after `explore`, what a plan depends on.
        variants: after `explore`, the variants whose forms groups choose from.
        tables: after `explore`, costs, noise and sizes.
        meter: after `explore`, what tells the size of a choice's file.
    """

    def __init__(self, model: ModelSource, options: Options) -> None:
        """Take the model and what a compilation of it would be told; budgets bound every point."""
        self.compilation = Compilation(model, options)

    def explore(self, against: tuple[Against, ...] = FRONTS, steps: int = 16) -> Exploration:
        """Measure costs, noise and sizes as a compilation does, and sweep the fronts.

        Args:
            against: what latency is weighed against.
            steps: points tried per front.

        Raises:
            CalibrationError: there are no feeds to measure noise on, where a front against noise is asked for.
            BudgetError: budgets that no choice holds, or a recipe that leaves nothing to choose.
            QCompilerError: bad input.
        """
        compilation = self.compilation
        compilation.prepare()
        if "noise" in against and compilation.judge is None:
            raise CalibrationError(
                "a front of accuracy needs feeds to measure noise on: give --calibration with data, or --against bytes"
            )
        self.planning, self.variants = compilation.prepare_plan()
        tables, _ = fill_tables(self.planning, self.variants)
        self.tables, self.meter = tables, fill_sizes(self.planning, self.variants, tables)
        if "noise" in against:
            self.planning.say("measure the noise of every quantized point")
            tables.noise = measure_table(self.planning, self.variants)
        if "noise" in against and tables.noise is None:
            raise CalibrationError("the noise of this model cannot be measured: take --against bytes")
        problem = tables.problem()
        limits = self._limits(problem.outputs).beside(tables.costs.total({}))
        fronts = tuple(front(problem, limits, each, compilation.pinned, steps=steps) for each in against)
        points = _distinct(fronts)
        knee = next((choose_knee(f, _TERMS.db_per_percent, _TERMS.comfort_db, _TERMS.share) for f in fronts), None)
        assert knee is not None
        if fronts[0].against != "noise":
            knee = fronts[0].points[0]
        warnings = (*compilation.data.warnings, *compilation.warnings)
        measured = self.planning.stopwatch is not None
        return Exploration(fronts, points, knee, fronts[0].all_float, warnings, measured)

    def build(self, point: Point) -> CompiledModel:
        """Return the compiled, proven model of a point; call `explore` first.

        Raises:
            BudgetError: the file is larger than a budget allows.
        """
        forms: dict[str, Form] = dict(point.choice)  # type: ignore[arg-type]  # options are forms here
        made = self.compilation.finish(forms, self.planning.engine_forms)
        most = self.compilation.settings.budget.bytes
        if most is not None and made.report.bytes_after > most:
            raise BudgetError(
                f"the point has {made.report.bytes_after} bytes, above the budget of {most}; take another"
            )
        return made

    def _limits(self, outputs: tuple[str, ...]) -> Limits:
        budget = self.compilation.settings.budget
        noise: Mapping[str, float] = {}
        if budget.sqnr_db is not None:
            noise = dict.fromkeys(outputs, noise_power(budget.sqnr_db))
        return replace(budget.limits(), noise=noise)


def _distinct(fronts: tuple[Front, ...]) -> tuple[Point, ...]:
    """Return the points of all fronts, each choice once, fastest first."""
    found: list[Point] = []
    for each in sorted((p for f in fronts for p in f.points), key=lambda p: (p.cost_us, p.bytes)):
        if all(each.choice != other.choice for other in found):
            found.append(each)
    return tuple(found)

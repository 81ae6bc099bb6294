"""How well measured cost tables predict: predicted against measured time of random mixes of forms.

Run ``python benchmarks/cost_model.py [--models DIR] [--only NAME ...] [--mixes N]``. Per model it measures a cost table
as the planner does, then builds the all-static and all-dynamic variants, the fastest choice that the table knows and
random mixes, and times all of them in turn with the float model. A ratio is predicted / measured time, each against
float, so that a slower machine does not count.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from subjects import RESULTS, Subject, list_subjects, load_subject, models_folder

from qcompiler.compilation import Compilation
from qcompiler.observed import wanted_values
from qcompiler.options import Options
from qcompiler.quant.plan import Form
from qcompiler.search.costs import CostTable
from qcompiler.search.measure_costs import CostMeter
from qcompiler.search.timing import EngineStopwatch
from qcompiler.targets.placement import Policy, propose
from qcompiler.workshop import Workshop

Forms = Mapping[str, Form]
CHOSEN, STATIC = "chosen", "static"


@dataclass
class Outcome:
    """One model: predicted / measured time against float by choice, of whole models and of the sum of their nodes."""

    name: str
    groups: int
    timed: dict[str, float] = field(default_factory=dict)
    profiled: dict[str, float] = field(default_factory=dict)
    steady: bool = True

    @property
    def mixes(self) -> list[float]:
        """Return the relative errors of the random mixes, by profile."""
        return [abs(r - 1.0) for name, r in self.profiled.items() if name.startswith("mix")]


def measure(subject: Subject, mixes: int, feeds: int, seed: int = 0) -> Outcome:
    """Fill a cost table and compare what it predicts with what is measured."""
    compilation = Compilation(subject.path, Options(calibration=list(subject.calibration)[:feeds], threads=1))
    compilation.prepare()
    workshop = compilation.workshop
    stopwatch = EngineStopwatch(compilation.engine, subject.feed, compilation.engine_options, seconds=2.0)
    static = _learned(workshop, propose(workshop.groups, Policy("static", "static-float", "float", True)))
    dynamic = _learned(workshop, {g.name: "dynamic" if "dynamic" in g.legal else "float" for g in workshop.groups})
    base = workshop.base
    elements = {name: int(array.size) for name, array in subject.feed.items()}
    for name in wanted_values(base.model, workshop.groups):
        if base.statistics is not None and base.statistics.observed(name):
            elements[name] = base.statistics.elements_per_feed(name)
    engine_forms = dict(workshop.engine_forms)
    meter = CostMeter(base.model, workshop.groups, base.target, workshop.build, stopwatch, elements, engine_forms)
    table = meter.table({STATIC: static, "dynamic": dynamic})
    choices: dict[str, Forms] = {"float": {}, STATIC: static, "dynamic": dynamic, CHOSEN: _fastest(table, workshop)}
    rng = random.Random(seed)
    choices |= {f"mix {i + 1}": _mix(table, rng) for i in range(mixes)}
    builds = {name: workshop.build(forms) for name, forms in choices.items()}
    times = stopwatch.compare({name: build.model for name, build in builds.items()})
    profiles = {name: _profile(stopwatch, build.model) for name, build in builds.items()}
    outcome = Outcome(subject.name, len(workshop.groups), steady=meter.steady)
    for name, build in builds.items():
        predicted = table.total(build.forms) / table.total({})
        outcome.timed[name] = predicted * times["float"].minimum / times[name].minimum
        outcome.profiled[name] = predicted * profiles["float"] / profiles[name]
    return outcome


def _profile(stopwatch: EngineStopwatch, model: object, overhead: float = 1.0) -> float:
    """Return the sum of the least times of all nodes, with a microsecond for what lies between two."""
    profile, _ = stopwatch.profile(model)  # type: ignore[arg-type]  # a graph, as built
    return sum(node.microseconds + overhead for node in profile.nodes)


def _learned(workshop: Workshop, forms: dict[str, Form]) -> dict[str, Form]:
    workshop.learn_emission(forms)
    made = workshop.build(forms)
    return {name: made.forms.get(name, "float") for name in forms}


def _fastest(table: CostTable, workshop: Workshop) -> dict[str, Form]:
    """Return the choice with the least predicted time that changing one group after another finds."""
    best: dict[str, Form] = dict.fromkeys(table.groups, "float")
    for start in ({}, {g.name: "static" for g in workshop.groups if "static" in table.groups[g.name]}):
        choice: dict[str, Form] = {**dict.fromkeys(table.groups, "float"), **start}  # type: ignore[dict-item]  # as given
        for _ in range(3):
            before = dict(choice)
            for name, options in table.groups.items():
                totals = {option: table.total({**choice, name: option}) for option in options}
                choice[name] = min(totals, key=totals.__getitem__)  # type: ignore[assignment]  # options of the table are forms
            if choice == before:
                break
        best = min((best, choice), key=table.total)
    return best


def _mix(table: CostTable, rng: random.Random) -> dict[str, Form]:
    """Return random forms: a random share of the groups takes one of its forms besides float."""
    share = rng.random()
    mixed: dict[str, Form] = {}
    for name, options in table.groups.items():
        others = [option for option in options if option != "float"]
        taken = rng.choice(others) if others and rng.random() < share else "float"
        mixed[name] = taken  # type: ignore[assignment]  # options of a measured table are forms
    return mixed


def report(outcomes: list[Outcome]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Predicted against measured time",
        "",
        "Predicted / measured time, each as a share of float's: below 1 is predicted too fast. The first figure is by",
        "whole models timed in turn, the one in brackets by the sum of their nodes' least times, which a busy machine",
        "disturbs less. Errors of the random mixes are by the latter.",
        "",
        "| model | groups | all static | chosen | mixes: median error | worst error | machine |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        static, chosen = (f"{o.timed[n]:.2f} ({o.profiled[n]:.2f})" for n in (STATIC, CHOSEN))
        errors = f"{statistics.median(o.mixes):.1%} | {max(o.mixes):.1%}"
        state = "steady" if o.steady else "busy"
        lines.append(f"| {o.name} | {o.groups} | {static} | {chosen} | {errors} | {state} |")
    middle = statistics.median(statistics.median(o.mixes) for o in outcomes)
    return "\n".join((*lines, "", f"Median over models of the median error: {middle:.1%}.", ""))


def main() -> None:
    """Measure the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, help="folder of models with a load.py; default: beside the checkout")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--mixes", type=int, default=5)
    parser.add_argument("--feeds", type=int, default=8, help="calibration feeds")
    options = parser.parse_args()
    models = models_folder(options.models)
    outcomes = []
    for group, name in list_subjects(models):
        if options.only and name not in options.only:
            continue
        outcomes.append(measure(load_subject(group, name, models), options.mixes, options.feeds))
        print(report(outcomes[-1:]).splitlines()[-3], flush=True)
    path = RESULTS / "cost_model.md"
    path.write_text(report(outcomes), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

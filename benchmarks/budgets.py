"""Do budgets hold: plan small models under many budgets, and check each on the file and on the engine.

Run ``python benchmarks/budgets.py [--models DIR] [--only NAME ...] [--feeds N]``. Per model the tables are filled once
(costs come from the user's cache where they are known), then five budgets, taken from the model's own fronts, are
planned, proven, built and written. A budget on bytes or bits is checked on the written file, one on the SQNR on the
data that the planner judges by, one on the latency by timing the build in turn with the float model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from subjects import RESULTS, Subject, list_subjects, load_subject, models_folder

from qcompiler.errors import BudgetError
from qcompiler.exploring import Explorer
from qcompiler.options import Options
from qcompiler.planning import Planning, plan_forms
from qcompiler.search.accuracy import Bound
from qcompiler.search.budget import Budget, parse_budget
from qcompiler.search.solution import Point

MOST_BYTES = 5_000_000
NEAR = 0.03
"""Share of the time that a build may take more than its budget."""


@dataclass
class Pair:
    """One model under one budget.

    Attributes:
        budget: as given on the command line.
        bytes: of the written file; 0 if the budget was refused.
        predicted_bytes: by the plan that was taken.
        bits: stored bits per weight.
        sqnr_db: least over the outputs, on the planner's data.
        us: measured when the plan was proven.
        predicted_us: by the plan that was taken.
        limit_share: of float's time, of a budget on the latency, else 0.
        speedup: float / compiled, timed in turn.
        rounds: plans that were built and measured.
        held: whether the budget holds, and the bytes are those predicted.
        why: what does not hold; of a refused budget the error.
    """

    model: str
    budget: str
    bytes: int = 0
    predicted_bytes: int = 0
    bits: float = 0.0
    sqnr_db: float = 0.0
    us: float = 0.0
    predicted_us: float = 0.0
    limit_share: float = 0.0
    speedup: float = 0.0
    rounds: int = 0
    held: bool = False
    why: str = ""


def budgets_of(every: tuple[Point, ...], plain: Point, bound: Bound) -> list[str]:
    """Return five budgets that bind: between the ends of a model's fronts, as far as the recipe's bounds let them."""
    points = [p for p in every if all(db >= bound.sqnr_db.get(n, 0.0) for n, db in p.sqnr_db.items())]
    smallest, fastest = min(p.bytes for p in points), points[0]
    bits = min(p.bits for p in points)
    finite = [p.worst_db for p in points if p.worst_db < 190.0]
    middle = (min(finite, default=20.0) + max(finite, default=40.0)) / 2.0
    return [
        f"bytes<={round(smallest + 0.1 * (plain.bytes - smallest))}b",
        f"bits<={bits + 0.2 * (plain.bits - bits):.3f}",
        f"sqnr>={min(middle, 45.0):.1f}",
        f"latency<={100.0 * (0.7 * min(1.0, fastest.cost_us / plain.cost_us) + 0.3):.2f}%",
        f"bytes<={round(smallest + 0.5 * (plain.bytes - smallest))}b sqnr>={min(finite, default=20.0) + 2.0:.1f}",
    ]


def measure(subject: Subject, feeds: int) -> Iterator[Pair]:
    """Plan, build and check one model under each of its budgets."""
    options = Options(calibration=list(subject.calibration)[:feeds], threads=1)
    explorer = Explorer(subject.path, options)
    found = explorer.explore()
    planning, variants = explorer.planning, explorer.variants
    for text in budgets_of(found.points, found.float_point, planning.bound):
        budget = parse_budget(text.split())
        yield _pair(subject.name, text, explorer, _under(planning, budget, explorer), variants)


def _under(planning: Planning, budget: Budget, explorer: Explorer) -> Planning:
    """Return the planning under a budget, with the noise that was measured already."""
    bound = planning.bound
    if budget.sqnr_db is not None:
        bound = Bound({n: max(db, budget.sqnr_db) for n, db in bound.sqnr_db.items()}, bound.agreement)
    return replace(planning, bound=bound, limits=budget.limits(), noise=explorer.tables.noise)


def _pair(name: str, text: str, explorer: Explorer, planning: Planning, variants: object) -> Pair:
    pair = Pair(name, text, limit_share=planning.limits.latency_share or 0.0)
    try:
        chosen = plan_forms(planning, variants)  # type: ignore[arg-type]  # options are forms here
    except BudgetError as error:
        pair.why = str(error)
        return pair
    plan = chosen.figures["plan"]
    pair.rounds, pair.predicted_us, pair.us = plan["rounds"], plan["predicted_us"], plan.get("measured_us", 0.0)
    pair.predicted_bytes = plan.get("predicted_bytes", 0)
    made = explorer.compilation.finish(chosen.forms, planning.engine_forms)
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "out.onnx"
        made.save(path)
        pair.bytes = path.stat().st_size
    pair.sqnr_db = made.report.quality.worst if made.report.quality is not None else 0.0
    pair.bits = explorer.meter.bits(made.model) / max(
        1, explorer.tables.sizes.weights if explorer.tables.sizes is not None else 0
    )
    assert planning.stopwatch is not None
    times = planning.stopwatch.compare({"float": explorer.compilation.reference, "compiled": made.model})
    pair.speedup = times["float"].minimum / times["compiled"].minimum
    _check(pair, planning)
    return pair


def _check(pair: Pair, planning: Planning) -> None:
    """Note what does not hold."""
    limits, missed = planning.limits, []
    if planning.sized and pair.bytes != pair.predicted_bytes:
        missed.append(f"{pair.bytes} bytes, {pair.predicted_bytes} predicted")
    if limits.bytes is not None and pair.bytes > limits.bytes:
        missed.append(f"{pair.bytes} bytes")
    if limits.bits is not None and pair.bits > limits.bits:
        missed.append(f"{pair.bits:.3f} bits")
    if pair.sqnr_db < min(planning.bound.sqnr_db.values(), default=0.0):
        missed.append(f"{pair.sqnr_db:.1f} dB")
    if pair.limit_share and 1.0 / pair.speedup > (1.0 + NEAR) * pair.limit_share:
        missed.append(f"{100.0 / pair.speedup:.1f} % of float's time")
    pair.held, pair.why = not missed, "; ".join(missed)


def report(pairs: list[Pair]) -> str:
    """Return the table as Markdown."""
    held, refused = sum(p.held for p in pairs), sum(not p.bytes for p in pairs)
    told = [abs(p.predicted_us / p.us - 1.0) for p in pairs if p.bytes and p.us > 0]
    lines = [
        "# Budgets",
        "",
        f"Of {len(pairs)} (model, budget) pairs {held} hold, {refused} were refused: no plan was found for them.",
        "Bytes are those of the written file and must be the predicted ones where a size is bounded; dB are the",
        "least over the outputs on the data that the planner judges by; us are those of the proof, at the pace of the",
        "float model when costs were tabled. Speed is float / compiled, timed in turn on one thread, and what a budget",
        "on the latency is checked by, with 3 % to spare for two timings of one model.",
        f"The time of the taken plan is predicted within {100 * statistics.median(told or [0.0]):.1f} % (median).",
        "",
        "| model | budget | bytes | bits | dB | us (predicted) | speed | plans | held |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for p in pairs:
        if not p.bytes:
            lines.append(f"| {p.model} | `{p.budget}` | | | | | | | refused: {p.why} |")
            continue
        state = "yes" if p.held else f"no: {p.why}"
        lines.append(
            f"| {p.model} | `{p.budget}` | {p.bytes} | {p.bits:.2f} | {min(p.sqnr_db, 200.0):.1f} "
            f"| {p.us:.1f} ({p.predicted_us:.1f}) | {p.speedup:.2f}x | {p.rounds} | {state} |"
        )
    return "\n".join((*lines, ""))


def main() -> None:
    """Measure the models and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", type=Path, help="folder of models with a load.py; default: beside the checkout")
    parser.add_argument("--only", nargs="*", help="names of models")
    parser.add_argument("--feeds", type=int, default=12, help="calibration feeds")
    options = parser.parse_args()
    models = models_folder(options.models)
    pairs: list[Pair] = []
    for group, name in list_subjects(models):
        if options.only and name not in options.only:
            continue
        subject = load_subject(group, name, models)
        weights = subject.path.with_name(subject.path.name + ".data")
        size = subject.path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)
        if size > MOST_BYTES:
            continue
        try:
            for pair in measure(subject, options.feeds):
                pairs.append(pair)
                print(report([pair]).splitlines()[-1], flush=True)
        except BudgetError as error:
            print(f"{name}: {error}", flush=True)
    stem = RESULTS / ("budgets-partial" if options.only else "budgets")
    stem.with_suffix(".md").write_text(report(pairs), encoding="utf-8")
    stem.with_suffix(".json").write_text(json.dumps([asdict(p) for p in pairs], indent=1) + "\n", encoding="utf-8")
    print(f"wrote {stem}.md, {stem}.json: {sum(p.held for p in pairs)} of {len(pairs)} held")


if __name__ == "__main__":
    main()

"""Measure what each accuracy treatment gains, on the feeds it is judged by and on data that nothing has seen.

Run ``python benchmarks/treatments.py``; ``--help`` lists the options. A full run writes ``treatments.md`` and
``treatments.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from estimators import evaluation_feeds
from rich.console import Console
from subjects import RESULTS, Subject, list_subjects, load_subject, models_folder

from qcompiler.backends.catalog import open_backend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import observe
from qcompiler.calibration.readers import as_feed_source
from qcompiler.engine import EngineOptions
from qcompiler.ir.importer import import_model
from qcompiler.observed import observed_values
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.search.ranges import decibels
from qcompiler.search.scores import ScoreErrors
from qcompiler.targets.host import detect, host_target_name
from qcompiler.targets.target import load_target
from qcompiler.treatments import Treated, correct_final, replay_treatments, try_treatments
from qcompiler.treatments.trying import likely_variants
from qcompiler.workshop import Workshop

LAST_ESTIMATOR = "auto"
"""Range estimator in force when biases are corrected: the rule that needs no measurement."""


@dataclass(frozen=True)
class Row:
    """One treatment of one model.

    Attributes:
        model: its name.
        treatment: its name.
        kept: whether it was.
        places: how many places it touches.
        held_out_db: SQNR before and after on the feeds that it is judged by.
        evaluation_db: on evaluation data; of a kept treatment only.
    """

    model: str
    treatment: str
    kept: bool
    places: int
    held_out_db: tuple[float, float]
    evaluation_db: tuple[float, float] | None


def measure(subject: Subject, most: int) -> tuple[list[Row], float]:
    """Return the treatments that were tried on a model, and the seconds that trying took."""
    engine, options = OrtEngine(), EngineOptions(threads=1)
    target = load_target(host_target_name(detect())[0])
    given = import_model(subject.path)
    split = as_feed_source(
        list(subject.calibration), engine.load(given, EngineOptions(optimize=False)).inputs
    ).split()  # fmt: skip
    state = CompileState(given, target)
    Pipeline(tuple(front_passes())).run(state)
    if state.imported:
        return [], 0.0
    names, squares = observed_values(state.model)
    statistics = state.statistics = observe(state.model, names, split.ranges, engine, squares=squares)
    workshop = Workshop(state, open_backend(target, None), options)
    judge = ScoreErrors(engine, state.model, evaluation_feeds(subject, most), (), options)
    held_out, start = list(split.held_out), time.perf_counter()
    found = try_treatments(workshop, statistics, split.ranges, held_out)
    forms = _forms(found)
    found.workshop.estimator = LAST_ESTIMATOR
    last = correct_final(found.workshop, found.statistics, forms, split.ranges, held_out)
    seconds = time.perf_counter() - start
    rows, kept = [], {}
    before = _judged(judge, Treated(workshop, statistics))
    for name, figures in found.figures.items():
        after = None
        if figures["kept"] and name in found.parameters:
            kept[name] = found.parameters[name]
            after = _judged(judge, replay_treatments(workshop, statistics, split.ranges, kept))
        rows.append(_row(subject.name, name, figures, before, after))
        before = before if after is None else after
    before = _judged(judge, found)
    rows += [
        _row(subject.name, name, figures, before, _judged(judge, last) if figures["kept"] else None)
        for name, figures in last.figures.items()
    ]
    return rows, seconds


def _forms(treated: Treated) -> Mapping[str, Any]:
    return likely_variants(treated.workshop.groups).get("static", {})


def _judged(judge: ScoreErrors, treated: Treated) -> float:
    return decibels(judge(treated.workshop.draft(_forms(treated), {})))


def _row(model: str, name: str, figures: Mapping[str, float], before: float, after: float | None) -> Row:
    variant = next(key.removesuffix("_db") for key in figures if not key.startswith("treated_"))
    held_out = figures[f"{variant}_db"], figures[f"treated_{variant}_db"]
    seen = None if after is None else (round(before, 2), round(after, 2))
    return Row(model, name, bool(figures["kept"]), int(figures.get("places", 0)), held_out, seen)


def table(rows: list[Row], seconds: Mapping[str, float]) -> str:
    """Return the table as Markdown."""
    lines = [
        "# Accuracy treatments: SQNR of the scores in dB", "",
        "All that can runs on calibrated integers. Each line is on top of the kept ones above it; *held out* are the "
        "calibration feeds by which a treatment is kept or refused, *evaluation* is data that nothing has seen. "
        f"Biases are corrected last, under the range estimator `{LAST_ESTIMATOR}`, so that line starts from another "
        f"figure. ONNX Runtime {version('onnxruntime')}, {detect().model}, one thread.", "",
        "| model | treatment | places | held out | | evaluation | gain |",
        "|---|---|---:|---|---|---|---:|",
    ]  # fmt: skip
    for row in rows:
        seen = "" if row.evaluation_db is None else f"{row.evaluation_db[0]:.1f} → {row.evaluation_db[1]:.1f}"
        gain = "" if row.evaluation_db is None else f"{row.evaluation_db[1] - row.evaluation_db[0]:+.1f}"
        held_out = f"{row.held_out_db[0]:.1f} → {row.held_out_db[1]:.1f}"
        outcome = "kept" if row.kept else "refused"
        lines.append(
            f"| {row.model} | {row.treatment} | {row.places} | {held_out} | {outcome} | {seen} | {gain} |"
        )  # fmt: skip
    kept = [row.evaluation_db[1] - row.evaluation_db[0] for row in rows if row.evaluation_db is not None]
    if kept:
        lines += [
            "",
            f"{len(kept)} of {len(rows)} trials were kept; {sum(gain > 0 for gain in kept)} of them gain on evaluation "
            f"data, too, the least {min(kept):+.1f} dB.",
            "",
            "Seconds of trying: " + ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items()) + ".",
        ]
    return "\n".join(lines) + "\n"


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; none are written with --only.")] = None,
    feeds: Annotated[int, typer.Option(help="Most evaluation feeds per model.")] = 32,
) -> None:
    """Try the treatments of every model and write the table."""
    console = Console(width=200)
    folder = models_folder(models)
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    for group, name in list_subjects(folder):
        if only and name not in only:
            continue
        found, spent = measure(load_subject(group, name, folder), feeds)
        if not found:
            console.print(f"{name}: nothing to try")
            continue
        rows += found
        seconds[name] = round(spent, 1)
        for row in found:
            console.print(f"{row}", markup=False)
    text = table(rows, seconds)
    console.print(text, markup=False)
    if not only or output is not None:
        place = output or RESULTS
        place.mkdir(parents=True, exist_ok=True)
        (place / "treatments.md").write_text(text, encoding="utf-8")
        data = {"rows": [asdict(r) for r in rows], "seconds": seconds}
        (place / "treatments.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

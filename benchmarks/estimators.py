"""Compare range estimators by the SQNR of whole models, on data used neither for ranges nor for choosing.

Run ``python benchmarks/estimators.py``; ``--help`` lists the options. Every group that has a static form takes it
(weights, arithmetic and movers alike), so that ranges matter as much as they can. A full run writes ``estimators.md``
and ``estimators.json``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from subjects import RESULTS, Subject, list_subjects, load_subject, models_folder

from qcompiler.backends.backend import OrtBackend
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.observe import observe
from qcompiler.calibration.readers import as_feed_source
from qcompiler.engine import EngineOptions
from qcompiler.estimating import ESTIMATOR_CHOICES, choose_estimators
from qcompiler.ir.importer import import_model
from qcompiler.observed import wanted_values
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.plan import Form
from qcompiler.search.quality import Judge
from qcompiler.targets.host import detect, host_target_name
from qcompiler.targets.placement import Policy, propose
from qcompiler.targets.target import load_target
from qcompiler.workshop import Workshop

PER_TENSOR = "per tensor"
"""Column of the rule that needs no measurement: least squared error behind the function that follows."""
AUTO = "auto"
SINGLES = tuple(name for name in ESTIMATOR_CHOICES if name != AUTO)

Feed = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Row:
    """SQNR in dB of one model under every estimator.

    Attributes:
        model: its name.
        feeds: evaluation feeds behind the figures.
        sqnr_db: by estimator; the worst output counts.
        chosen: what auto took for the whole model, and for how many groups it took another.
        departing: number of those groups.
        builds: builds that auto measured.
        seconds: time that auto took.
    """

    model: str
    feeds: int
    sqnr_db: dict[str, float]
    chosen: str
    departing: int
    builds: int
    seconds: float

    @property
    def best(self) -> float:
        """Return the SQNR of the best single estimator, chosen with the evaluation data in view."""
        return max(self.sqnr_db[name] for name in SINGLES)

    @property
    def gap(self) -> float:
        """Return auto less the best single estimator, in dB."""
        return self.sqnr_db[AUTO] - self.best


def evaluation_feeds(subject: Subject, most: int) -> list[Feed]:
    """Return evenly spread evaluation feeds; a carried state is the float model's."""
    runner = OrtEngine().load(str(subject.path))
    names = [o.name for o in runner.outputs]
    feeds: list[Feed] = []

    def run(feed: Feed) -> list[npt.NDArray[Any]]:
        feeds.append(dict(feed))
        results = runner.run(feed)
        return [results[name] for name in names]

    subject.run_all(run)
    places = np.unique(np.linspace(0, len(feeds) - 1, min(most, len(feeds))).astype(int))
    return [feeds[i] for i in places]


def prepare(subject: Subject, engine: OrtEngine, options: EngineOptions) -> tuple[Workshop, Any, dict[str, Form]]:
    """Import, canonicalize and calibrate one model; return its workshop, split feeds and static forms."""
    target = load_target(host_target_name(detect())[0])
    given = import_model(subject.path)
    state = CompileState(given.clone(), target)
    Pipeline(front_passes()).run(state)
    # Numbers of an imported quantized model would win over every estimator.
    state.imported.clear()
    workshop = Workshop(state, OrtBackend(), options, given=given)
    inputs = engine.load(given, EngineOptions(optimize=False)).inputs
    split = as_feed_source(list(subject.calibration), inputs).split()
    names = list(dict.fromkeys(wanted_values(state.model, workshop.groups)))
    state.statistics = observe(state.model, names, split.ranges, engine)
    forms = propose(workshop.groups, Policy("static", "static", "float", arithmetic=True))
    workshop.learn_emission(forms)
    return workshop, split, forms


def compare(subject: Subject, most: int) -> Row | None:
    """Measure one model under every estimator, or return None if nothing of it has a static form."""
    engine, options = OrtEngine(), EngineOptions(threads=1)
    workshop, split, forms = prepare(subject, engine, options)
    if all(form == "float" for form in forms.values()):
        return None
    feeds = evaluation_feeds(subject, most)
    judge = Judge(engine, workshop.base.model, feeds, (), options)
    figures: dict[str, float] = {}
    for name in ESTIMATOR_CHOICES:
        workshop.estimator = name
        column = PER_TENSOR if name == AUTO else name
        figures[column] = round(judge(workshop.build(forms).model).worst, 2)
    start = time.perf_counter()
    found = choose_estimators(workshop, forms, {}, list(split.held_out), split.ranges)
    spent = time.perf_counter() - start
    figures[AUTO] = round(judge(workshop.build(forms).model).worst, 2)
    return Row(subject.name, len(feeds), figures, found.estimator, len(found.estimators), found.tried, round(spent, 1))


def table(rows: list[Row]) -> str:
    """Return the table and what it says as Markdown."""
    columns = [*SINGLES, PER_TENSOR, AUTO]
    lines = [
        "# Range estimators: SQNR of the outputs in dB", "",
        "Every group that has a static form takes it. Judged on evaluation feeds, which served neither ranges nor the "
        f"choice. ONNX Runtime {version('onnxruntime')}, {detect().model}, one thread. *{PER_TENSOR}* is the rule "
        f"without measurement; *{AUTO}* measures, region by region. *gap* is {AUTO} less the best of the single "
        "estimators, which only the evaluation data could tell.", "",
        "| model | feeds | " + " | ".join(columns) + " | gap | builds | seconds |",
        "|---|" + "---:|" * (len(columns) + 4),
    ]  # fmt: skip
    for row in rows:
        best = row.best
        cells = [f"**{v:.2f}**" if (v := row.sqnr_db[c]) == best else f"{v:.2f}" for c in columns]
        lines.append(
            f"| {row.model} | {row.feeds} | " + " | ".join(cells)
            + f" | {row.gap:+.2f} | {row.builds} | {row.seconds:.1f} |"
        )  # fmt: skip
    if rows:
        good = sum(row.gap >= 0 for row in rows)
        near = sum(row.gap >= -0.1 for row in rows)
        lines += [
            "",
            f"{AUTO} is at least as good as the best single estimator on {good} of {len(rows)} models, within 0.1 dB "
            f"of it on {near}; at worst {min(row.gap for row in rows):+.2f} dB.",
        ]
    return "\n".join(lines) + "\n"


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results; none are written with --only.")] = None,
    feeds: Annotated[int, typer.Option(help="Most evaluation feeds per model.")] = 200,
) -> None:
    """Measure every model under every estimator and write the table."""
    console = Console(width=200)
    folder = models_folder(models)
    rows: list[Row] = []
    for group, name in list_subjects(folder):
        if only and name not in only:
            continue
        row = compare(load_subject(group, name, folder), feeds)
        if row is None:
            console.print(f"{name}: nothing has a static form")
            continue
        rows.append(row)
        console.print(f"{name}: {row.sqnr_db} {row.chosen} +{row.departing} {row.gap:+.2f} dB, {row.seconds} s")
    text = table(rows)
    console.print(text, markup=False)
    if not only or output is not None:
        place = output or RESULTS
        place.mkdir(parents=True, exist_ok=True)
        (place / "estimators.md").write_text(text, encoding="utf-8")
        (place / "estimators.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

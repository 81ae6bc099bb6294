"""Does a budget on a metric hold on data that it was not chosen on, and how fast is what holds it.

Run ``python benchmarks/drop_budgets.py``; ``--help`` lists the options. The evaluation feeds of a model are dealt into
two folds. Two builds are made, each with ``--metric`` over one fold and a budget of at most 0.2 points (0.2 % where the
metric is unbounded) or one sample of the fold, whichever is more. Each build then runs on the other fold, and the
metric over all feeds, none of which its build has seen, is compared with float's. Builds are timed in turn with float.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import context
from rich.console import Console
from scoring import geometric_mean
from subjects import RESULTS, Array, Outputs, Subject, list_subjects, load_subject, models_folder, more_is_better

import qcompiler
from qcompiler.backends.catalog import engine_backend, engine_of
from qcompiler.engine import EngineOptions, Runner
from qcompiler.errors import QCompilerError
from qcompiler.search.timing import interleave

PACKAGES = ("onnxruntime", "onnx", "numpy", "qcompiler")
POINTS = 0.002
"""What the metric may lose: absolute in 0..1 where more is better, else relative."""
FOLDS = 2


@dataclass
class Row:
    """One model under the budget.

    Attributes:
        model: its name.
        metric: name of its main metric.
        reference: the float model's, over all evaluation feeds.
        found: of the two builds, each on the fold that it was not chosen on.
        allowed: by how much it may be worse.
        seen: of each build on the fold that it was chosen on: by how much it is worse there.
        sqnr_db: least over the outputs and builds on set-aside calibration feeds.
        speedups: float / compiled latency of each build, minima of interleaved runs.
        seconds: of both compilations.
        error: why there is no build.
    """

    model: str
    metric: str
    reference: float
    found: float = 0.0
    allowed: float = 0.0
    seen: tuple[float, ...] = ()
    sqnr_db: float = 0.0
    speedups: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str = ""

    @property
    def loss(self) -> float:
        """Return by how much the metric is worse than float's; negative where it is better."""
        return self.reference - self.found if more_is_better(self.metric) else self.found - self.reference

    @property
    def holds(self) -> bool:
        """Return whether the metric holds on data that was not chosen on."""
        return not self.error and self.loss <= self.allowed + 1e-9

    @property
    def usable(self) -> float:
        """Return the speed-up, the geometric mean of both builds; 1.0 where the budget is missed."""
        return max(1.0, geometric_mean(self.speedups)) if self.holds else 1.0


@dataclass(frozen=True)
class Fold:
    """A model's metric over some of its evaluation feeds.

    All other outputs are float's, so that labels need not be cut: what one fold changes of the whole metric, times the
    number of folds, is what it changes of its own.

    Attributes:
        subject: the model.
        plain: float outputs of every feed.
        feeds: all feeds, recurrent state included as float had it.
        members: positions of the fold's feeds.
        reference: the float metric.
    """

    subject: Subject
    plain: Sequence[Outputs]
    feeds: Sequence[Mapping[str, Array]]
    members: tuple[int, ...]
    reference: float

    def own_feeds(self) -> list[Mapping[str, Array]]:
        """Return the fold's feeds."""
        return [self.feeds[i] for i in self.members]

    def metric(self, outputs: Sequence[Mapping[str, Array]], feeds: Sequence[Mapping[str, Array]]) -> float:
        """Return the metric of the fold, more is better: what ``--metric`` asks for."""
        mixed = list(self.plain)
        for i, found in zip(self.members, outputs, strict=True):
            mixed[i] = list(found.values())
        name, value = next(iter(self.subject.metric(mixed).items()))
        change = FOLDS * (value - self.reference)
        return self.reference + change if more_is_better(name) else -(self.reference + change)


def measure(subject: Subject, rounds: int, seconds: float) -> Row:
    """Build twice, each for one fold, and judge each on the other."""
    plain_runner = _open(subject.path)
    feeds: list[Mapping[str, Array]] = []

    def run(feed: Mapping[str, Array]) -> Outputs:
        feeds.append(dict(feed))
        return list(plain_runner.run(feed).values())

    plain = subject.run_all(run)
    name, reference = next(iter(subject.metric(plain).items()))
    row = Row(subject.name, name, reference)
    samples = sum(_rows(feed) for feed in feeds)
    bounded = more_is_better(name) and 0.0 <= reference <= 1.0
    row.allowed = max(POINTS, 1.0 / samples) if bounded else POINTS * abs(reference)
    judged, runners, seen, qualities = list(plain), {"float": plain_runner}, [], []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as work:
        for number in range(FOLDS):
            members = tuple(range(number, len(feeds), FOLDS))
            fold = Fold(subject, plain, feeds, members, reference)
            fold_samples = sum(_rows(feeds[i]) for i in members)
            budget = f"drop<={100 * max(POINTS, 1.0 / fold_samples):.6f}pt" if bounded else f"drop<={100 * POINTS}%"
            try:
                made = qcompiler.compile(
                    subject.path, calibration=subject.calibration, evaluation=fold.own_feeds(), metric=fold.metric,
                    budget=budget,
                )  # fmt: skip
            except QCompilerError as error:
                row.error = f"{type(error).__name__}: {error}"
                return row
            path = Path(work) / f"{number}.onnx"
            made.save(path)
            runner = runners[f"fold {number}"] = _open(path)
            quality = made.report.quality
            qualities.append(quality.worst if quality is not None else 0.0)
            found = [runner.run(feed) for feed in feeds]
            told = fold.metric([found[i] for i in members], fold.own_feeds())
            seen.append((reference if more_is_better(name) else -reference) - told)
            for i in range(len(feeds)):
                if i not in members:
                    judged[i] = list(found[i].values())
        row.seconds = time.perf_counter() - start
        row.found = next(iter(subject.metric(judged).values()))
        row.seen, row.sqnr_db = tuple(seen), min(qualities)
        times = interleave(runners, subject.feed, rounds=rounds, seconds=seconds * len(runners), most=1_000_000)
    row.speedups = tuple(times["float"].minimum / t.minimum for key, t in times.items() if key != "float")
    return row


def _rows(feed: Mapping[str, Array]) -> int:
    """Return the samples of a feed: the length of the first axis of its first value."""
    first = next(iter(feed.values()))
    return int(first.shape[0]) if first.ndim else 1


def _open(path: Path) -> Runner:
    return engine_backend(engine_of(path)).engine.load(path, EngineOptions(threads=1))


def table(rows: Sequence[Row], about: Mapping[str, str]) -> str:
    """Return the table as Markdown."""
    mean = geometric_mean(row.usable for row in rows)
    lines = [
        "# Budgets on a metric, judged on data that they were not chosen on",
        "",
        "Evaluation feeds are dealt into two folds; each of two builds is chosen by the metric over one of them, with",
        f"a budget of {100 * POINTS:g} points ({100 * POINTS:g} % where the metric is unbounded) or one sample, and",
        "judged on the other. *Loss* is that of the metric over all feeds, each run by the build that has not seen it.",
        "Speed is float / compiled, the geometric mean of both builds; 1.0 counts where more is lost than allowed.",
        "",
        "| model | metric | of float | loss | allowed | loss where chosen | SQNR dB | speed | usable |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row.error:
            lines.append(f"| {row.model} | {row.metric} | {row.reference:.4f} | {row.error} | | | | | 1.00 |")
            continue
        seen = ", ".join(f"{loss:+.4f}" for loss in row.seen)
        lines.append(
            f"| {row.model} | {row.metric} | {row.reference:.4f} | {row.loss:+.4f} | {row.allowed:.4f} | {seen} "
            f"| {min(row.sqnr_db, 200.0):.1f} | {geometric_mean(row.speedups):.2f} | {row.usable:.2f} |"
        )
    lines += [
        "",
        f"Geometric mean of the usable speed-up: **{mean:.2f}**; the budget holds for {sum(r.holds for r in rows)} of "
        f"{len(rows)} models.",
        "",
        f"{about['processor']}; {about['versions']}; {about['timing']}.",
    ]
    return "\n".join((*lines, ""))


def main(
    models: Annotated[Path | None, typer.Option(help="Folder of models with a load.py.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a model; may be repeated.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
    seconds: Annotated[float, typer.Option(help="Least time for each build of a model.")] = 1.0,
    rounds: Annotated[int, typer.Option(help="Least number of interleaved rounds.")] = 30,
) -> None:
    """Build every model under a budget on its metric, chosen and judged on different data, and write the table."""
    console = Console(width=200)
    folder = models_folder(models)
    rows: list[Row] = []
    about = context(PACKAGES, rounds, seconds)
    for group, name in list_subjects(folder):
        if only and name not in only:
            continue
        row = measure(load_subject(group, name, folder), rounds, seconds)
        rows.append(row)
        console.print(table([row], about).splitlines()[9], markup=False)
    stem = "drop_budgets-partial" if only else "drop_budgets"
    output.mkdir(parents=True, exist_ok=True)
    reference = [row for row in rows if row.model in {n for g, n in list_subjects(folder) if g == "models"}]
    (output / f"{stem}.md").write_text(table(reference or rows, about), encoding="utf-8")
    data: dict[str, Any] = {"context": about, "rows": [asdict(r) | {"loss": r.loss, "holds": r.holds} for r in rows]}
    (output / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

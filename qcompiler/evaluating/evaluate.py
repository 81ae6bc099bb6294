"""Evaluate a compiled model against its float model: outputs, a user's metric, layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from qcompiler.calibration.source_options import SourceOptions
from qcompiler.engine import Feeds
from qcompiler.evaluating.closeness import Closeness, compare
from qcompiler.evaluating.layers import MOST_FEEDS, LayerTrace, trace_layers
from qcompiler.evaluating.pair import Pair, Results, open_pair, read_feeds, run_both
from qcompiler.evaluating.task import TaskFigure, measure_task
from qcompiler.options import Calibration, ModelSource, Progress
from qcompiler.search.quality import Metric, class_like_outputs
from qcompiler.search.sections import cut, find_sections, places


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        model: name of the float model.
        compiled: name of the compiled model.
        closeness: of the outputs.
        task: the metric of both; None without one.
        layers: where error is born and grows.
        feeds: number of feeds.
        notes: what a user should know.
    """

    model: str
    compiled: str
    closeness: Closeness
    task: TaskFigure | None
    layers: LayerTrace
    feeds: int
    notes: tuple[str, ...] = field(default=())


def evaluate(
    source: ModelSource,
    compiled: str | Path,
    evaluation: Calibration,
    *,
    metric: Metric | None = None,
    threads: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    sources: SourceOptions | None = None,
    decisions: str | Path | None = None,
    layer_feeds: int = MOST_FEEDS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a compiled model on data.

    Args:
        source: the float model.
        compiled: path of the compiled model, as `qcompiler.load` takes it; layers are looked at in an .onnx only.
        evaluation: feeds, as for `qcompiler.compile`.
        metric: function (outputs per feed, feeds) -> float, more is better.
        threads: threads inside one operator.
        shapes: lengths of open axes.
        sources: how files become feeds.
        decisions: the decisions record, where it does not lie beside the compiled model.
        layer_feeds: feeds that layers are measured on; 0 leaves layers out.
        seed: of the draws behind the intervals.
        progress: called with one line per step.

    Raises:
        QCompilerError: a file cannot be read, or the two models do not belong together.
    """
    say = progress or (lambda text: None)
    say("load both models")
    pair = open_pair(source, compiled, threads=threads, shapes=shapes, decisions=decisions)
    feeds = read_feeds(pair.reference.inputs, evaluation, sources)
    say(f"run both models on {len(feeds)} feeds")
    kept: list[tuple[Results, Results]] = []
    closeness = _compare(pair, _runs(pair, feeds, kept, metric is not None))
    task = None
    if metric is not None:
        say("measure the metric")
        task = measure_task(metric, feeds, [a for a, _ in kept], [b for _, b in kept], seed)
    trace = LayerTrace(note="layers were left out")
    if layer_feeds:
        say("trace the layers")
        trace = trace_layers(pair, feeds, layer_feeds)
    name = str(source) if isinstance(source, str | Path) else "the float model"
    return Evaluation(name, str(pair.path), closeness, task, trace, len(feeds), pair.notes)


def _compare(pair: Pair, runs: Iterator[tuple[Feeds, Results, Results]]) -> Closeness:
    """Compare the outputs, those that join quantities of different scale section by section."""
    classes = class_like_outputs(pair.given)
    first = list(islice(runs, 1))
    found = find_sections(pair.given, [wanted for _, wanted, _ in first])
    sections = {name: parts for name, parts in found.items() if name not in classes}
    parted = ((feed, cut(wanted, sections), cut(made, sections)) for feed, wanted, made in chain(first, runs))
    return compare(parted, places(pair.outputs, sections), classes)


def _runs(
    pair: Pair, feeds: Sequence[Feeds], kept: list[tuple[Results, Results]], keep: bool
) -> Iterator[tuple[Feeds, Results, Results]]:
    """Yield the runs, and keep the outputs for a metric, which takes all at once."""
    for feed, wanted, found in run_both(pair, list(feeds)):
        if keep:
            kept.append((wanted, found))
        yield feed, wanted, found

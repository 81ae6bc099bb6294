"""Calibrate a model by itself: gather statistics that any later compilation takes in place of data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.driver import Gathered, Plan, gather
from qcompiler.calibration.estimators import estimate
from qcompiler.calibration.executors import open_workers
from qcompiler.calibration.observe import Progress
from qcompiler.calibration.qcal import (
    Journal,
    Key,
    check_key,
    chosen_ranges,
    load_qcal,
    read_journal,
    write_journal,
    write_qcal,
)
from qcompiler.calibration.readers import FeedSource, as_feed_source, synthetic_feeds
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Parts, Statistics, TensorStatistics
from qcompiler.engine import Engine, EngineOptions
from qcompiler.errors import CalibrationError
from qcompiler.ir.importer import import_model
from qcompiler.observed import observed_values, statistics_key
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.runnable import load_runnable
from qcompiler.targets.target import load_target, target_names

DEFAULT_ESTIMATORS = ("min-max", "percentile:99.99", "entropy", "mse")
"""Estimators whose ranges are written into a file for its human readers."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Everything about a calibration but the model and the feeds; see `qcompiler.calibrate`."""

    estimators: Sequence[str] = DEFAULT_ESTIMATORS
    memory: int | None = None
    executor: Executor | str | None = None
    scheduler: str | None = None
    threads: int = 1
    shapes: Mapping[str, Sequence[int]] | None = None
    sources: SourceOptions = field(default_factory=SourceOptions)
    synthetic: int = 0
    parts: Mapping[str, Parts] = field(default_factory=dict)
    until_stable: float | None = None
    output: Path | None = None
    resume: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibration gives.

    Attributes:
        statistics: of every value that some target could quantize.
        reused: whether the file of an earlier run was still valid, so that nothing ran.
        stopped: whether the ranges were stable before the feeds ended.
        notes: what a user should know.
    """

    statistics: Statistics
    reused: bool = False
    stopped: bool = False
    notes: tuple[str, ...] = ()


def journal_path(output: Path) -> Path:
    """Return where an unfinished run keeps what it has."""
    return output.with_name(f"{output.name}.partial")


def calibrate_model(model: Any, feeds: Any, options: CalibrationOptions, engine: Engine | None = None) -> Calibration:
    """Calibrate one model; `qcompiler.calibrate` is the public face."""
    probe = TensorStatistics()
    probe.add(np.array([-1.0, 1.0], np.float32))
    for estimator in options.estimators:
        estimate(probe, estimator)  # an unknown one is better named before the work than after it
    engine = engine or OrtEngine()
    given = import_model(model, shapes=options.shapes)
    target = load_target(target_names()[0])
    _, runner, _ = load_runnable(given, engine, replace(EngineOptions(options.threads), optimize=False), target)
    source = _source(feeds, given, runner.inputs, options)
    state = CompileState(given, target)
    Pipeline(front_passes()).run(state)
    names, squares = observed_values(state.model)
    if unknown := [n for n in options.parts if n not in names]:
        raise CalibrationError(f"{unknown[0]!r} is not among the observed values; they are {', '.join(names[:5])}, ...")
    keyed = [*names, *(f"{n}{parts}" for n, parts in options.parts.items())]
    key = statistics_key(state.model, keyed, engine, options.threads, source.identity)
    if (reused := _still_valid(key, options)) is not None:
        return reused
    plan = Plan(
        state.model, names, engine, options.threads, options.memory, squares, options.parts, options.until_stable
    )  # fmt: skip
    gathered = _gather(plan, source, key, options)
    if source.about:
        gathered.notes.insert(0, f"feeds: {source.about}")
    statistics = gathered.statistics
    # A run that stopped early is not of all the data: it must not stand in for one that is.
    about = replace(key, data=gathered.data_digest if gathered.stopped or key.data is None else key.data)
    statistics.about, statistics.synthetic = about.to_about(), source.synthetic or ""
    if options.output is not None:
        write_qcal(statistics, options.output, ranges=chosen_ranges(statistics, options.estimators))
        with suppress(OSError):
            journal_path(options.output).unlink(missing_ok=True)
    return Calibration(statistics, stopped=gathered.stopped, notes=tuple(gathered.notes))


def _source(feeds: Any, model: ir.Model, inputs: Any, options: CalibrationOptions) -> FeedSource:
    if options.synthetic:
        return synthetic_feeds(model, inputs, options.synthetic)
    # An iterator is read once here: no need to keep what it gives, as compiling must.
    given = (lambda: feeds) if isinstance(feeds, Iterator) else feeds
    return as_feed_source(given, inputs, options.sources)


def _still_valid(key: Key, options: CalibrationOptions) -> Calibration | None:
    """Return the file of an earlier run if it is of the same model, data and engine; data without identity never is.

    The ranges that the file shows to people become those of the estimators that are wanted now.
    """
    if options.output is None or not options.output.exists() or key.data is None or options.until_stable is not None:
        return None
    try:
        found = load_qcal(options.output)
        if check_key(found.key, key):
            return None
    except CalibrationError:
        return None
    if any(set(by) != set(options.estimators) for by in found.ranges.values()):
        ranges = chosen_ranges(found.statistics, options.estimators)
        write_qcal(found.statistics, options.output, ranges=ranges)
    return Calibration(found.statistics, reused=True)


def _gather(plan: Plan, source: FeedSource, key: Key, options: CalibrationOptions) -> Gathered:
    journal = None if options.output is None else journal_path(options.output)

    def save(statistics: Statistics, digests: Mapping[int, str]) -> None:
        assert journal is not None
        statistics.about = key.to_about()
        write_journal(Journal(statistics, digests), journal)

    resumed = None
    if options.resume:
        if journal is None:
            raise CalibrationError("resuming needs the output that the interrupted run was to write")
        resumed = _resumed(journal, key)
    with open_workers(options.executor, options.scheduler) as workers:
        return gather(
            plan, source, workers, resumed=resumed, save=save if journal is not None else None,
            progress=options.progress,
        )  # fmt: skip


def _resumed(journal: Path, key: Key) -> tuple[Statistics, Mapping[int, str]] | None:
    """Return the state of an interrupted run, None if there is none.

    Raises:
        CalibrationError: the state is of another model, of other data or damaged.
    """
    if not journal.exists():
        return None
    found = read_journal(journal)
    if differences := check_key(Key.from_about(found.statistics.about), key):
        raise CalibrationError(f"cannot resume from {journal}: {'; '.join(differences)}; run without resuming")
    return found.statistics, found.digests

"""The data of one compilation: feeds to calibrate with, feeds set aside, feeds of the user's metric, or statistics."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompiler.calibration.driver import Plan, gather
from qcompiler.calibration.exchange import RangeTable, read_ranges
from qcompiler.calibration.executors import open_workers
from qcompiler.calibration.qcal import read_qcal
from qcompiler.calibration.readers import FeedSource, as_feed_source, random_feeds, synthetic_feeds
from qcompiler.calibration.source_options import SourceOptions
from qcompiler.calibration.statistics import Statistics
from qcompiler.engine import Engine, Feeds, TensorInfo
from qcompiler.errors import CalibrationError
from qcompiler.ir.serialize import graph_digest
from qcompiler.observed import observed_values, wanted_values
from qcompiler.targets.groups import Group

_MOST_HELD_OUT = 16
"""Evaluation feeds that serve the accuracy guard where there is no calibration data."""
_MOVED = 0.1
"""A range that grew by more over the last tenth of the feeds asks for more feeds."""
_MOVED_SHARE = 0.05

Say = Callable[[str], None]


@dataclass(frozen=True)
class DataOptions:
    """What the user says about data; see `qcompiler.compile`."""

    calibration: Any = None
    evaluation: Any = None
    random: int = 0
    synthetic: int = 0
    sources: SourceOptions = field(default_factory=SourceOptions)
    memory: int | None = None
    executor: Executor | str | None = None
    scheduler: str | None = None


@dataclass
class Dataset:
    """The data of one compilation.

    Attributes:
        feeds: what to calibrate with; None if there is nothing, or statistics stand in for it.
        evaluation: feeds of the user's metric.
        statistics: observed ranges, after `observe` at the latest.
        ranges: the feeds that statistics were gathered from.
        held_out: feeds set aside for checking and timing.
        warnings: what a user should know.
    """

    warnings: list[str] = field(default_factory=list)
    feeds: FeedSource | None = None
    evaluation: FeedSource | None = None
    statistics: Statistics | RangeTable | None = None
    ranges: FeedSource | None = None
    held_out: list[Feeds] = field(default_factory=list)

    def observe(self, model: ir.Model, groups: Sequence[Group], engine: Engine, options: DataOptions, say: Say) -> None:
        """Set feeds aside and gather statistics of the canonical graph from the others."""
        if self.ranges is not None:
            return  # done by a compilation for another target: the canonical graph is the same
        if self.statistics is not None:
            self._check(model, groups)
        if self.feeds is None:
            # Without this a budget on the metric would go unchecked.
            if self.evaluation is not None:
                self.held_out = list(itertools.islice(self.evaluation, _MOST_HELD_OUT))
            return
        split = self.feeds.split()
        if split.shared:
            self.warnings.append("a single calibration feed serves for ranges and for checking alike; give more feeds")

        began = time.perf_counter()

        def report(done: int, total: int | None) -> None:
            pace = (time.perf_counter() - began) / done
            left = f"/{total} ({pace * (total - done):.0f} s left)" if total else f" ({1 / pace:.1f}/s)"
            say(f"calibrate {done}{left}")

        names, squares = observed_values(model)
        with open_workers(options.executor, options.scheduler) as workers:
            plan = Plan(model, names, engine, memory=options.memory, squares=squares)
            gathered = gather(plan, split.ranges, workers, progress=report)
        self.statistics = gathered.statistics
        self.warnings += gathered.notes
        self._tell_movement()
        self.held_out = list(split.held_out)
        self.ranges = split.ranges

    def _tell_movement(self) -> None:
        assert isinstance(self.statistics, Statistics)
        moved = self.statistics.movement()
        wide = sum(share > _MOVED for share in moved.values())
        if self.statistics.feeds >= 10 and wide > _MOVED_SHARE * len(moved):
            self.warnings.append(
                f"{wide} of {len(moved)} ranges still grew by more than {_MOVED:.0%} over the last tenth of the "
                "calibration feeds: more feeds would change them"
            )

    def _check(self, model: ir.Model, groups: Sequence[Group]) -> None:
        """Refuse statistics of another graph: names may agree by chance, numbers do not."""
        assert self.statistics is not None
        about = self.statistics.about if isinstance(self.statistics, Statistics) else {}
        made_of = about.get("graph")
        if made_of is None:
            missing = [n for n in wanted_values(model, groups) if not self.statistics.observed(n)]
            if len(missing) == len(set(wanted_values(model, groups))):
                raise CalibrationError("the statistics name no tensor of this model; calibrate it anew")
            if missing:
                self.warnings.append(
                    f"the statistics lack {len(set(missing))} tensors, such as {missing[0]!r}: what needs them stays "
                    "float"
                )
        elif made_of != (now := graph_digest(model)):
            raise CalibrationError(
                f"the statistics are of another model, or of this one with other weights or shapes (graph "
                f"{made_of[:12]}, this is {now[:12]}); calibrate anew: "
                "qcompiler calibrate MODEL --calibration SRC -o FILE.qcal"
            )


def open_dataset(options: DataOptions, model: ir.Model, inputs: Sequence[TensorInfo]) -> Dataset:
    """Open what the user gave, and say what its absence means.

    Args:
        options: the user's.
        model: the imported model, from which synthetic feeds are made.
        inputs: what a feed gives.
    """
    data = Dataset()
    warnings = data.warnings
    if options.evaluation is not None:
        data.evaluation = as_feed_source(options.evaluation, inputs, options.sources)
    given = options.calibration
    if isinstance(given, Statistics | RangeTable):
        data.statistics = given
    elif isinstance(given, str | Path) and (found := read_statistics(Path(given))) is not None:
        data.statistics = found
    elif given is not None:
        data.feeds = as_feed_source(given, inputs, options.sources)
    elif options.synthetic:
        data.feeds = synthetic_feeds(model, inputs, options.synthetic)
    elif options.random:
        data.feeds = as_feed_source(random_feeds(inputs, options.random), inputs)
        warnings.append(
            "calibrated with random data, as asked: ranges and accuracy figures say nothing about real data"
        )
    if data.feeds is not None and data.feeds.about and "assumed" in data.feeds.about:
        warnings.append(f"calibration feeds: {data.feeds.about}")
    _tell_absence(data, warnings)
    return data


def read_statistics(path: Path) -> Statistics | RangeTable | None:
    """Return the statistics in a .qcal file, or the ranges in a TensorRT cache or a JSON file; None for data.

    Raises:
        CalibrationError: the file cannot be read.
    """
    if path.suffix == ".qcal":
        return read_qcal(path)
    if path.suffix in (".cache", ".json") and path.is_file():
        return read_ranges(path)
    return None


def _tell_absence(data: Dataset, warnings: list[str]) -> None:
    made = data.feeds.synthetic or "" if data.feeds is not None else ""
    if data.statistics is not None:
        made = data.statistics.synthetic if isinstance(data.statistics, Statistics) else ""
        if isinstance(data.statistics, RangeTable):
            warnings.append(data.statistics.note)
        if data.evaluation is None:
            warnings.append(
                "calibrated from statistics alone: accuracy was not measured; give --evaluation SRC for the accuracy "
                "guard"
            )
    elif data.feeds is None:
        warnings.append(
            "no calibration data: only dynamic forms were considered, and evaluation feeds serve the accuracy guard; "
            "give --calibration SRC for static forms"
            if data.evaluation is not None
            else "no calibration data: only dynamic forms were considered and accuracy was not measured; "
            "give --calibration SRC for static forms and the accuracy guard"
        )
    if made:
        warnings.append(f"calibrated with synthetic data ({made}): ranges and accuracy figures are guesses")

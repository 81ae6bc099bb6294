"""Timing that can be trusted on a shared machine: interleaved rounds, minimum and median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from qcompiler.engine import Engine, EngineOptions, Feeds, ModelLike, Profile, Runner

Clock = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Seconds per run of one candidate: minimum and median over the rounds."""

    minimum: float
    median: float
    rounds: int


class Stopwatch(Protocol):
    """What the searches ask of measurement; tests hand in one with an invented machine."""

    def profile(self, model: ModelLike) -> tuple[Profile, ir.Model]:
        """Return per-node times, and the graph the engine executed."""
        ...

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        """Time whole models, interleaved."""
        ...


def interleave(
    runners: Mapping[str, Runner],
    feeds: Feeds,
    *,
    rounds: int = 15,
    seconds: float = 0.4,
    most: int = 2000,
    clock: Clock = time.perf_counter,
) -> dict[str, Timing]:
    """Run all candidates in turn, round after round, so that a slow spell of the machine hits all alike.

    Args:
        runners: candidates by name.
        feeds: one feed that all take.
        rounds: at least so many rounds.
        seconds: at least so much time, spent over all candidates.
        most: at most so many rounds.
        clock: returns seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        runner.run(feeds)
    start = clock()
    count = 0
    while count < rounds or (clock() - start < seconds and count < most):
        # Every other round backwards: being first after another model's cache lines is no one's privilege.
        order = list(runners.items())
        for name, runner in order if count % 2 == 0 else reversed(order):
            begin = clock()
            runner.run(feeds)
            times[name].append(clock() - begin)
        count += 1
    return {n: Timing(min(t), statistics.median(t), len(t)) for n, t in times.items()}


@dataclass(frozen=True)
class EngineStopwatch:
    """Measure on a real engine.

    Attributes:
        engine: runs and profiles.
        feeds: a representative feed.
        options: threads.
        rounds: profiler rounds.
        seconds: least time of one comparison.
    """

    engine: Engine
    feeds: Feeds
    options: EngineOptions = EngineOptions()
    rounds: int = 12
    seconds: float = 0.4

    def profile(self, model: ModelLike) -> tuple[Profile, ir.Model]:
        """Return per-node times, and the graph the engine executed."""
        profile = self.engine.profile(model, self.feeds, self.options, self.rounds)
        return profile, profile.executed or self.engine.optimized_graph(model, self.options)

    def compare(self, models: Mapping[str, ModelLike]) -> dict[str, Timing]:
        """Time whole models, interleaved."""
        runners = {name: self.engine.load(model, self.options) for name, model in models.items()}
        return interleave(runners, self.feeds, seconds=self.seconds)

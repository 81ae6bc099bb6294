"""Interleaved rounds on an invented clock."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler.engine import Array, EngineOptions, Feeds, TensorInfo
from qcompiler.search.timing import EngineStopwatch, Timing, interleave
from tests.passes.quantize.lab import ENGINE, import_exactly, model_of

FEED = {"x": np.zeros(1, np.float32)}


@dataclass
class Machine:
    """A clock that only runs when a runner does."""

    now: float = 100.0
    log: list[str] = field(default_factory=list)


@dataclass
class Runs:
    """Take the given seconds, run after run; the first is the warm-up. The last one repeats."""

    machine: Machine
    name: str
    seconds: list[float]
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()

    def run(self, feeds: Feeds, outputs: Sequence[str] | None = None) -> dict[str, Array]:
        assert feeds is FEED
        self.machine.log.append(self.name)
        self.machine.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return {}


def times(
    first: list[float], second: list[float], *, rounds: int = 4, seconds: float = 0.0, most: int = 2000
) -> tuple[dict[str, Timing], str]:
    machine = Machine()
    runners = {"a": Runs(machine, "a", first), "b": Runs(machine, "b", second)}
    found = interleave(runners, FEED, rounds=rounds, seconds=seconds, most=most, clock=lambda: machine.now)
    return found, "".join(machine.log)


def test_the_order_alternates_after_one_warm_up_each() -> None:
    _, log = times([1.0], [1.0], rounds=5)
    assert log == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"


def test_minimum_and_median_leave_out_the_warm_up() -> None:
    found, _ = times([0.25, 4.0, 2.0, 8.0, 16.0], [0.5, 3.0, 3.0, 3.0, 1.0])
    assert found["a"] == Timing(minimum=2.0, median=6.0, rounds=4)
    assert found["b"] == Timing(minimum=1.0, median=3.0, rounds=4)


def test_an_odd_number_of_rounds_has_a_measured_median() -> None:
    found, _ = times([9.0, 5.0, 1.0, 3.0], [9.0, 2.0, 2.0, 2.0], rounds=3)
    assert found["a"].median == statistics.median([5.0, 1.0, 3.0]) == 3.0


def test_rounds_go_on_until_the_time_is_spent() -> None:
    found, log = times([0.125], [0.125], rounds=2, seconds=1.0)
    assert found["a"].rounds == found["b"].rounds == 4  # a round takes 0.25 s
    assert len(log) == 2 + 8


def test_there_are_at_least_so_many_rounds() -> None:
    found, _ = times([10.0], [10.0], rounds=3, seconds=1.0)
    assert found["a"].rounds == 3


def test_a_fast_model_stops_at_the_limit() -> None:
    found, _ = times([0.0], [0.0], rounds=2, seconds=1.0, most=7)
    assert found["a"].rounds == 7


def test_a_slow_spell_hits_both_alike() -> None:
    """A machine that is ten times slower in every second round changes no minimum."""
    spell = [1.0, 1.0, 10.0, 1.0, 10.0]
    found, _ = times(list(spell), [2 * s for s in spell])
    assert (found["a"].minimum, found["b"].minimum) == (1.0, 2.0)


def test_the_engine_stopwatch_gives_each_executed_node_a_time() -> None:
    weights = {"w": np.eye(8, dtype=np.float32)}
    model = import_exactly(model_of("float[2,8] x", "float[] y", "[m] t = MatMul(x, w) [e] y = Exp(t)", weights))
    watch = EngineStopwatch(ENGINE, {"x": np.ones((2, 8), np.float32)}, EngineOptions(threads=1), 3, 0.0)
    profile, executed = watch.profile(model)
    assert {n.name for n in profile.nodes} == {str(n.name) for n in executed.graph} == {"m", "e"}
    assert profile.total == sum(n.microseconds for n in profile.nodes)
    assert {name: t.rounds for name, t in watch.compare({"one": model, "two": model}).items()} == {"one": 15, "two": 15}

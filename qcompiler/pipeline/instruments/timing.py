"""Measure the wall time of every pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qcompiler.pipeline.pipeline import Step
from qcompiler.pipeline.state import CompileState


@dataclass(frozen=True)
class PassTime:
    """Wall time of one pass: its text, seconds, number of changes, and whether it failed."""

    text: str
    seconds: float
    changes: int
    failed: bool = False


@dataclass
class TimeInstrument:
    """Record wall time and change counts; put it last in the list, so that no other instrument is counted.

    Attributes:
        clock: returns seconds; replaceable in tests.
        times: one entry per pass run, in order.
    """

    clock: Callable[[], float] = time.perf_counter
    times: list[PassTime] = field(default_factory=list)
    _start: float | None = None

    def before_pass(self, state: CompileState, step: Step) -> None:
        """Start the clock."""
        self._start = self.clock()

    def after_pass(self, state: CompileState, step: Step, changes: int) -> None:
        """Stop the clock."""
        self._stop(step, changes, failed=False)

    def on_failure(self, state: CompileState, step: Step, error: Exception) -> None:
        """Record the time until the pass failed (not if a check behind it did)."""
        self._stop(step, 0, failed=True)

    def _stop(self, step: Step, changes: int, failed: bool) -> None:
        if self._start is not None:
            self.times.append(PassTime(step.text, self.clock() - self._start, changes, failed))
            self._start = None

    @property
    def total(self) -> float:
        """Return the seconds of all passes together."""
        return sum(entry.seconds for entry in self.times)

"""Figures of one form against float: SQNR, task metric, usable speed-up, geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from subjects import Array, Outputs, more_is_better

CEILING = 200.0
"""SQNR in dB given to outputs that are equal bit for bit."""
POINT = 0.01
"""What a metric may lose: absolute where it lies in 0..1 and more is better, else relative."""


@dataclass
class FormResult:
    """All figures of one form of one model.

    Attributes:
        form: its name.
        error: why it could not be measured, in a few words.
        speedup: float / form latency, minima over the rounds.
        speedup_median: the same of medians.
        milliseconds: (minimum, median) of one run.
        metrics: by name, the main one first.
        sqnr_db: per output, over all evaluation feeds.
        holds: whether no metric falls by more than a point.
        seconds: of the compile step.
        peak_mib: peak resident memory of the process of the compile step.
        feeds: calibration feeds it got.
        size: bytes of the model.
        notes: what the form says of itself.
    """

    form: str
    error: str | None = None
    speedup: float | None = None
    speedup_median: float | None = None
    milliseconds: tuple[float, float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    holds: bool = False
    seconds: float = 0.0
    peak_mib: float = 0.0
    feeds: int = 0
    size: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def usable_speedup(self) -> float:
        """Return float / form latency; 1.0 if the form is missing, slower, or its metric falls too far."""
        if self.error is not None or self.speedup is None or not self.holds:
            return 1.0
        return max(1.0, self.speedup)

    @property
    def usable(self) -> bool:
        """Return whether the form runs and its metrics hold, whatever its speed."""
        return self.error is None and self.holds

    @property
    def worst_sqnr(self) -> float | None:
        """Return the least SQNR over the outputs in dB."""
        return min(self.sqnr_db.values(), default=None)


def holds(reference: Mapping[str, float], found: Mapping[str, float]) -> bool:
    """Return whether every metric stays within a point of float's: 0.01 in 0..1, 1 % where it is unbounded."""
    for name, wanted in reference.items():
        value = found[name]
        upward = more_is_better(name)
        bounded = upward and 0.0 <= wanted <= 1.0
        allowed = POINT if bounded else POINT * abs(wanted)
        loss = wanted - value if upward else value - wanted
        if math.isnan(loss) or loss > allowed + 1e-9:
            return False
    return True


@dataclass
class SqnrMeter:
    """Gather signal and error power per output, feed by feed; integers of 8 bits count as numbers, others do not."""

    names: Sequence[str]
    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, wanted: Outputs, found: Outputs) -> None:
        """Compare the outputs of one feed."""
        for name, a, b in zip(self.names, wanted, found, strict=True):
            if a.dtype.kind not in "fiu" or (a.dtype.kind != "f" and a.dtype.itemsize > 1):
                continue
            signal, noise = _powers(a.astype(np.float64), b.astype(np.float64))
            self.signal[name] = self.signal.get(name, 0.0) + signal
            self.noise[name] = self.noise.get(name, 0.0) + noise

    def decibels(self) -> dict[str, float]:
        """Return 10 log10(signal power / error power) per output, at most `CEILING`."""
        return {name: _decibel(self.signal[name], self.noise[name]) for name in self.signal}


def _powers(wanted: Array, found: Array) -> tuple[float, float]:
    if wanted.shape != found.shape:
        return float(np.square(wanted).sum()), math.inf
    finite = np.isfinite(wanted)
    noise = np.square(wanted[finite] - found[finite]).sum()
    return float(np.square(wanted[finite]).sum()), float(noise) if np.isfinite(noise) else math.inf


def _decibel(signal: float, noise: float) -> float:
    if noise <= 0:
        return CEILING
    if math.isinf(noise):
        return -CEILING
    return float(np.clip(10.0 * math.log10(max(signal, 1e-300) / noise), -CEILING, CEILING))


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean, 1.0 of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else 1.0

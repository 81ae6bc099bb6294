"""Distributions that estimators are tried on, and what they are compared with."""

from __future__ import annotations

import numpy as np

from qcompiler.calibration.statistics import TensorStatistics


def seen(*feeds: object) -> TensorStatistics:
    """Return the statistics of some feeds."""
    made = TensorStatistics()
    for feed in feeds:
        made.add(np.asarray(feed, np.float32))
    return made


_RANDOM = np.random.default_rng(1)
SAMPLES = {
    "normal": _RANDOM.standard_normal(100_000),
    "laplace": _RANDOM.laplace(size=100_000),
    "relu": np.maximum(_RANDOM.standard_normal(100_000), 0),
    "uniform": _RANDOM.uniform(-1, 3, 100_000),
    "outlier": np.append(_RANDOM.standard_normal(100_000), [60.0]),
    "negative": -np.abs(_RANDOM.laplace(size=100_000)),
    "far": _RANDOM.standard_normal(10_000) + 40.0,
}


def squared_error(values: np.ndarray, low: float, high: float, bits: int = 8) -> float:
    """Return the mean squared error of affine quantization over a range, to nearest, with an exact zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    steps = 2**bits - 1
    scale = (high - low) / steps
    zero = np.rint(-low / scale)
    stored = np.clip(np.rint(values / scale) + zero, 0, steps)
    return float(np.square((stored - zero) * scale - values).mean())

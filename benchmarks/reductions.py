"""Where a value is reduced more cheaply: by NumPy on memory handed over, or by operators inside the graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.parser

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.statistics import HALF_BINS, TensorStatistics
from qcompiler.engine import Array, EngineOptions

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
BINS = 2 * HALF_BINS
_OPTIONS = EngineOptions(threads=1, optimize=False)
_SECONDS = 2.0
_PRODUCER = "y = Neg(x)"
_MIN_MAX = "low = ReduceMin<keepdims=0>(y) high = ReduceMax<keepdims=0>(y)"
_SQUARES = "square = ReduceSumSquare<keepdims=0>(y)"
HISTOGRAM = f"""
    scaled = Mul(y, inverse)
    floored = Floor(scaled)
    whole = Cast<to=7>(floored)
    index = Add(whole, half)
    shape = Shape(y)
    one = Constant<value_int=1>()
    ones = Expand(one, shape)
    zero = Constant<value = int64[{BINS}] {{{", ".join("0" for _ in range(BINS))}}}>()
    counts = ScatterElements<axis=0, reduction="add">(zero, index, ones)
"""
"""Histogram of ``y`` with the bins of `TensorStatistics`."""
COUNTS = f"int64[{BINS}] counts"


def measure_reductions() -> list[dict[str, Any]]:
    """Return nanoseconds per element for each size and way; what the producing operator takes is subtracted.

    The values are normally distributed, on one thread, with the engine's optimizations off.
    """
    return [_measure(size) for size in SIZES]


def _measure(size: int) -> dict[str, Any]:
    values = np.random.default_rng(0).standard_normal(size, np.float32)
    seen = TensorStatistics()
    ways: dict[str, Callable[[], object]] = {
        "producer": handed_over(values, lambda array: None),
        "NumPy min, max": handed_over(values, lambda array: (array.min(), array.max())),
        "all of our statistics": handed_over(values, lambda array: seen.add(array, 0)),
        "ReduceMin, ReduceMax": inside(values, _MIN_MAX, "float low, float high"),
        "ReduceMin, ReduceMax, ReduceSumSquare": inside(
            values, _MIN_MAX + _SQUARES, "float low, float high, float square"
        ),
        "histogram by ScatterElements": inside(values, HISTOGRAM, COUNTS),
    }
    times = _interleaved(ways)
    least = times.pop("producer")
    return {"size": size} | {way: (seconds - least) / size * 1e9 for way, seconds in times.items()}


def handed_over(values: Array, reduce: Callable[[Array], object]) -> Callable[[], object]:
    """Return a run that hands the produced tensor to Python without a copy."""
    engine = OrtEngine()
    runner = engine.load(_model(_PRODUCER, f"float[{values.size}] y"), _OPTIONS)
    given = engine.value(values)

    def run() -> object:
        return reduce(runner.run_values({"x": given}, ["y"])["y"].array())

    return run


def inside(values: Array, body: str, outputs: str) -> Callable[[], list[Array]]:
    """Return a run whose only outputs are what the operators in ``body`` reduce ``y = -values`` to."""
    engine = OrtEngine()
    runner = engine.load(_model(_PRODUCER + "\n" + body, outputs), _OPTIONS)
    reach = float(np.abs(values).max())
    inverse = np.float32(2.0 ** -np.ceil(np.log2(reach / HALF_BINS)))
    given = {"x": engine.value(values)}
    if "inverse" in body:
        given |= {"inverse": engine.value(np.array(inverse)), "half": engine.value(np.array(HALF_BINS, np.int64))}
    names = [name.rpartition(" ")[2] for name in outputs.split(", ")]

    def run() -> list[Array]:
        return [value.array() for value in runner.run_values(given, names).values()]

    return run


def _model(body: str, outputs: str) -> bytes:
    scale = ", float inverse, int64 half" if "inverse" in body else ""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n] x{scale}) => ({outputs}) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _interleaved(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least seconds of each way, all run in turn."""
    least = dict.fromkeys(ways, float("inf"))
    end = time.perf_counter() + _SECONDS * len(ways)
    rounds = 0
    while rounds < 5 or time.perf_counter() < end:
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - start)
        rounds += 1
    return least

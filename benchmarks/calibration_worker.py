"""Measure one calibration in a process of its own: reads a request (first argument), writes the result (second).

Everything is imported and the feeds are in memory before the clock starts and the resident memory is read: what is
reported is above that.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator
from reductions import measure_reductions
from subjects import DEMO, Array, load_subject

from qcompiler.api import calibrate
from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.driver import Plan, gather
from qcompiler.calibration.executors import open_workers
from qcompiler.calibration.statistics import Statistics
from qcompiler.calibrator import calibrate_model
from qcompiler.ir.graph import is_float
from qcompiler.ir.importer import import_model
from qcompiler.passes.front import front_passes
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target, target_names

assert calibrate_model  # `calibrate` imports it late; here it belongs in front of the clock

ESTIMATORS = ("percentile:99.999", "entropy")
"""ONNX Runtime's percentile is 99.999 by default."""
METHODS = {"percentile": CalibrationMethod.Percentile, "entropy": CalibrationMethod.Entropy}
MIN_MAX = {"min-max": CalibrationMethod.MinMax}

Feeds = Mapping[str, Array]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        task: ``ours``, ``ours-all`` (every float value), ``theirs``, ``theirs-min-max``, ``generator`` or
            ``reductions``.
        group: group of the model.
        name: its name.
        models: folder of models with a ``load.py``.
        executor: where our calibration runs.
        single: stay on one core with one thread.
        feeds: number of feeds of a generator.
        operators: ONNX Runtime's percentile looks at what these read and write alone; empty for everything.
    """

    task: str
    group: str = DEMO
    name: str = ""
    models: str | None = None
    executor: str = "inline"
    single: bool = True
    feeds: int = 0
    operators: Sequence[str] = ()


class Meter:
    """Wall time, processor time and peak resident memory from its making on."""

    def __init__(self) -> None:
        gc.collect()
        with suppress(AttributeError, OSError):  # glibc alone has it
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = _status("VmRSS")
        self.busy = _busy_seconds()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Return seconds, processor seconds, cores that others kept busy, and MB (10^6 bytes) above the start."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return {
            "seconds": wall,
            "cpu_seconds": cpu,
            "others_cores": max(0.0, (_busy_seconds() - self.busy - cpu) / wall),
            "peak_mb": (_status("VmHWM") - self.before) / 1e6,
            "before_mb": self.before / 1e6,
        }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _busy_seconds() -> float:
    """Return for how long the cores of this machine have been busy, all together."""
    ticks = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    idle, waiting = ticks[3], ticks[4]
    return (sum(ticks[:8]) - idle - waiting) / os.sysconf("SC_CLK_TCK")


# ---- ours --------------------------------------------------------------------------------------------------------


def measure_ours(request: Request) -> dict[str, Any]:
    """Gather statistics and take both ranges of every tensor, from the file on."""
    path, feeds = _load(request)
    meter = Meter()
    statistics = _all_values(path, feeds, request) if request.task == "ours-all" else _usual(path, feeds, request)
    gathered = meter.read()
    for name in statistics:
        if statistics.observed(name):
            for estimator in ESTIMATORS:
                statistics.range(name, estimator)
    return meter.read() | {
        "gather_seconds": gathered["seconds"],
        "tensors": sum(map(statistics.observed, statistics)),
        "elements": sum(tensor.count for tensor in statistics.tensors.values()),
        "feeds": statistics.feeds,
    }


def _usual(path: Path, feeds: list[Feeds], request: Request) -> Statistics:
    return calibrate(path, feeds, executor=request.executor)


def _all_values(path: Path, feeds: list[Feeds], request: Request) -> Statistics:
    """Observe what ONNX Runtime observes as well: inputs and results of every node, as far as they are float."""
    state = CompileState(import_model(path), load_target(target_names()[0]))
    Pipeline(front_passes()).run(state)
    values = [*state.model.graph.inputs, *(v for node in state.model.graph.all_nodes() for v in node.outputs)]
    names = list(dict.fromkeys(str(v.name) for v in values if is_float(v)))
    with open_workers(request.executor) as workers:
        return gather(Plan(state.model, names, OrtEngine()), feeds, workers).statistics


# ---- ONNX Runtime's ----------------------------------------------------------------------------------------------


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
    def __init__(self, feeds: list[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        """Return the next feed, None at the end."""
        return next(self._feeds, None)


def measure_theirs(request: Request) -> dict[str, Any]:
    """Let ONNX Runtime calibrate, one calibrator after the other; making them is left out of the time."""
    path, feeds = _load(request)
    methods = MIN_MAX if request.task == "theirs-min-max" else METHODS
    found: dict[str, Any] = {"feeds": len(feeds)}
    making = making_cpu = 0.0
    with tempfile.TemporaryDirectory(prefix="qcompiler-bench-") as folder:
        meter = Meter()
        for name, method in methods.items():
            augmented = str(Path(folder) / f"{name}.onnx")
            wall, cpu = time.perf_counter(), time.process_time()
            operators = list(request.operators) if name == "percentile" and request.operators else None
            calibrator = create_calibrator(str(path), operators, augmented, calibrate_method=method)
            if request.single:  # the same session on one thread; the calibrator has no option for it
                calibrator.infer_session = _one_thread(augmented)
            making += time.perf_counter() - wall
            making_cpu += time.process_time() - cpu
            calibrator.collect_data(_Reader(feeds))
            ranges = calibrator.compute_data()
            figures = meter.read()
            figures["seconds"] -= making
            figures["cpu_seconds"] -= making_cpu
            found[name] = figures
            figures["tensors"] = len(list(ranges.keys()))
            if method != CalibrationMethod.MinMax:
                histograms = calibrator.collector.get_histogram_dict().values()
                figures["elements"] = int(sum(h[0].sum() for h in histograms))
            del calibrator, ranges
            gc.collect()
        return found | figures | {"making_seconds": making}


def _one_thread(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


# ---- feeds from a generator --------------------------------------------------------------------------------------


def measure_generator(request: Request) -> dict[str, Any]:
    """Calibrate on feeds that a generator makes as they are asked for."""
    path, samples = _load(request)
    meter = Meter()
    statistics = calibrate(path, made_up(samples, request.feeds), executor=request.executor)
    return meter.read() | {
        "feeds": statistics.feeds,
        "tensors": sum(map(statistics.observed, statistics)),
        "elements": sum(tensor.count for tensor in statistics.tensors.values()),
    }


def made_up(samples: list[Feeds], count: int) -> Iterator[Feeds]:
    """Yield fresh feeds cut out of samples; batch size and, for tokens, length go through all sizes every 32 feeds."""
    for index in range(count):
        sample = samples[index % len(samples)]
        feed: dict[str, Array] = {}
        for name, array in sample.items():
            rows = 1 + index % array.shape[0]
            part = array[:rows]
            if array.dtype.kind == "i":
                part = part[:, : array.shape[1] * (1 + index % 8) // 8]
                feed[name] = np.array(part)
            else:
                feed[name] = np.asarray(part * (1 + (index % 97) / 1000), array.dtype)
        yield feed


def _load(request: Request) -> tuple[Path, list[Feeds]]:
    models = Path(request.models) if request.models else None
    subject = load_subject(request.group, request.name, models)
    return subject.path, [dict(feed) for feed in subject.calibration]


def _reductions(_: Request) -> dict[str, Any]:
    return {"rows": measure_reductions()}


TASKS: Mapping[str, Callable[[Request], dict[str, Any]]] = {
    "ours": measure_ours,
    "ours-all": measure_ours,
    "theirs": measure_theirs,
    "theirs-min-max": measure_theirs,
    "generator": measure_generator,
    "reductions": _reductions,
}


def main() -> None:
    """Measure, and write what was found or why it failed."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    if request.single:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        found = TASKS[request.task](request)
    except Exception as error:  # a calibrator may raise anything
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

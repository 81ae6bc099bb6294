"""What the tests of sharing feeds out have in common: a model, feeds, and executors and engines that misbehave."""

from __future__ import annotations

import pickle
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.driver import Gathered, Plan, gather
from qcompiler.calibration.executors import Workers, open_workers
from qcompiler.calibration.qcal import write_qcal
from qcompiler.calibration.statistics import Parts, Statistics
from qcompiler.engine import Array, EngineValue, Feeds
from qcompiler.ir.text import parse_text

F = np.float32
NAMES = ("x", "h", "r", "e", "u", "y")
TEXT = """<ir_version: 10, opset_import: ["" : 21]>
main (float[N,4] x) => (float[N,3] y)
<float[4,3] w = {1,2,3,4,5,6,-7,8,9,-1,-2,3}, float ten = {10.0}>
{ [a] h = MatMul(x, w)
  [b] r = Sqrt(h)
  [m] z = ReduceMax<keepdims = 0>(h)
  [g] big = Greater(z, ten)
  [o] y = If (big) <
    then_branch = t () => (float[N,3] e) { [i] e = Neg(r) },
    else_branch = f () => (float[N,3] u) { [j] u = Abs(r) }> }"""


def model() -> ir.Model:
    """Return a model in which some feeds run one branch of an If and some the other; NaN comes of negative numbers."""
    made = parse_text(TEXT)
    weights = made.graph.initializers["w"]
    weights.const_value = ir.tensor(np.abs(weights.const_value.numpy()), name="w")  # type: ignore[union-attr]
    return made


def feeds(count: int = 40) -> list[Feeds]:
    """Return feeds of one to five rows; the first number of each is its index / 64."""
    made: list[Feeds] = []
    for index in range(count):
        x = np.abs(np.random.default_rng(index).standard_normal((1 + index % 5, 4))).astype(F) * F(0.5)
        x[0, 0] = index / 64
        made.append({"x": x})
    return made


def plan(engine: OrtEngine | None = None, stable: float | None = None, parts: dict[str, Parts] | None = None) -> Plan:
    return Plan(model(), NAMES, engine or OrtEngine(), squares=("h",), parts=parts or {}, stable=stable)


def share(
    executor: Executor | str | Workers, given: Iterable[Feeds] | None = None, of: Plan | None = None, **options: Any
) -> Gathered:
    """Gather on an executor."""
    workers = executor if isinstance(executor, Workers) else open_workers(executor)
    with workers:
        return gather(of or plan(), feeds() if given is None else given, workers, **options)


def as_bytes(statistics: Statistics, folder: Path) -> bytes:
    """Return the file of statistics, in which every bit of them is."""
    path = folder / "compared.qcal"
    write_qcal(statistics, path)
    return path.read_bytes()


class NotingEngine(OrtEngine):
    """ONNX Runtime that notes which feeds went in."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def value(self, array: Array) -> EngineValue:
        if array.ndim == 2:
            self.indices.append(round(float(array[0, 0]) * 64))
        return super().value(array)


class Copying(Executor):
    """An executor that runs a call at once on copies of everything, as a process elsewhere would.

    Attributes:
        before: called with the number of the call, before it runs.
        calls: arguments of each.
    """

    _max_workers = 2

    def __init__(self, before: Callable[[int], object] = lambda number: None) -> None:
        self.before = before
        self.calls: list[tuple[Any, ...]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append(args)
        try:
            self.before(len(self.calls) - 1)
            called, given = pickle.loads(pickle.dumps((fn, args)))
            future.set_result(pickle.loads(pickle.dumps(called(*given))))
        except Exception as error:
            future.set_exception(pickle.loads(pickle.dumps(error)))
        return future


DEADLY = 17
"""Index of the feed at which a `deadly_engine` dies."""


def deadly_engine(folder: Path, always: bool = False) -> OrtEngine:
    """Return an engine that kills its process at feed `DEADLY`, the first time or always, but never this process.

    Its class lies in a module of its own in ``folder``, which is to be on the path, so that other processes find it.
    """
    (folder / "deadly.py").write_text(
        textwrap.dedent("""
            import os, signal
            from pathlib import Path
            from qcompiler.backends.onnxruntime import OrtEngine

            class DeadlyEngine(OrtEngine):
                def __init__(self, mark, index, always):
                    self.mark, self.index, self.always, self.home = mark, index, always, os.getpid()

                def value(self, array):
                    if array.ndim == 2 and round(float(array[0, 0]) * 64) == self.index and os.getpid() != self.home:
                        try:
                            Path(self.mark).touch(exist_ok=self.always)
                        except FileExistsError:
                            return super().value(array)
                        os.kill(os.getpid(), signal.SIGKILL)
                    return super().value(array)
        """)
    )
    from importlib import import_module

    made: OrtEngine = import_module("deadly").DeadlyEngine(str(folder / "died"), DEADLY, always)
    return made


def interrupted(given: list[Feeds], at: int) -> Iterator[Feeds]:
    """Yield feeds until the user interrupts."""
    yield from given[:at]
    raise KeyboardInterrupt

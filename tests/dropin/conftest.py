"""A cache of its own for every test, a small model, and sessions that can be waited for."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.dropin import settings
from qcompiler.dropin.jobs import registry
from qcompiler.dropin.session import InferenceSession
from qcompiler.dropin.status import Status

WIDTH = 96


def small_net(*, opset: int = 20, ir_version: int = 9, overridable: bool = False, seed: int = 0) -> onnx.ModelProto:
    """Return x [rows, 96] -> MatMul, Relu, MatMul -> y; wide enough that its weights are quantized."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32) for _ in range(2)]
    stored = [numpy_helper.from_array(w, name) for w, name in zip(weights, ("w1", "w2"), strict=True)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", WIDTH])]
    if overridable:
        inputs += [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, [WIDTH, WIDTH]) for t in stored]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], name="second"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", WIDTH])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    helper.set_model_props(model, {"names": "{0: 'cat'}"})
    return model


def feeds(count: int, rows: int = 4, seed: int = 1) -> list[dict[str, npt.NDArray[np.float32]]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(0, 1, (rows, WIDTH)).astype(np.float32)} for _ in range(count)]


def one_thread(**more: Any) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    for name, value in more.items():
        setattr(options, name, value)
    return options


def sqnr(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    noise = float(np.square(reference - found).sum())
    return float("inf") if noise == 0 else 10 * np.log10(float(np.square(reference).sum()) / noise)


class Told:
    """A callback that can be waited for."""

    def __init__(self) -> None:
        self.status: list[Status] = []
        self._event = threading.Event()

    def __call__(self, status: Status) -> None:
        self.status.append(status)
        self._event.set()

    def wait(self) -> Status:
        assert self._event.wait(60), "the drop-in said nothing for a minute"
        return self.status[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set the environment so that a session compiles by rule, into a folder of this test's."""
    for name in vars(settings).values():
        if isinstance(name, str) and name.startswith("QCOMPILER_"):
            monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "cache"
    monkeypatch.setenv("QCOMPILER_CACHE", str(folder))
    monkeypatch.setenv("QCOMPILER_GUARD", "off")
    monkeypatch.setenv("QCOMPILER_NICE", "0")  # tests wait for it
    registry.cache_clear()  # its warnings are said once per process
    yield folder
    for job in registry()._jobs.values():
        atexit.unregister(job.finish)  # what a test has collected is not worth a compilation


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(small_net(), path)
    return path


@pytest.fixture
def swapped(net: Path) -> Callable[..., InferenceSession]:
    """Return a function that makes a session of the small model and brings it to its compiled state."""

    def make(count: int = 4) -> InferenceSession:
        told = Told()
        options = {"requests": count, "callback": told}
        session = InferenceSession(net, one_thread(), ["CPUExecutionProvider"], qcompiler_options=options)
        for feed in feeds(count):
            session.run(None, feed)
        assert told.wait().state == "compiled"
        return session

    return make

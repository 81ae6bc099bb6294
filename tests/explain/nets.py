"""Random small nets, and builds of them in which one value is stored with a wrong range."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompiler.calibration.exchange import RangeTable
from qcompiler.compiled import CompiledModel
from qcompiler.compiler import compile_model
from qcompiler.engine import Array
from qcompiler.explaining.stored_values import ranges_of
from qcompiler.options import Options

F = np.float32


class _Net:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}

    def weight(self, name: str, *shape: int, fan: float) -> str:
        self.weights[name] = (self.rng.standard_normal(shape) * np.sqrt(2 / fan)).astype(F)
        return name

    def node(self, op: str, name: str, out: str, *inputs: str, **attributes: list[int]) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], name=name, **attributes))
        return out

    def cnn(self) -> list[int]:
        channels, last, x = int(self.rng.integers(6, 10)), 3, "x"
        for i in range(int(self.rng.integers(3, 5))):
            w, b = self.weight(f"w{i}", channels, last, 3, 3, fan=9 * last), self.weight(f"b{i}", channels, fan=200)
            y = self.node("Conv", f"conv{i}", f"c{i}", x, w, b, pads=[1, 1, 1, 1])
            y = self.node("Relu", f"relu{i}", f"r{i}", y)
            if i and self.rng.random() < 0.4:
                y = self.node("Add", f"add{i}", f"a{i}", y, x)
            x, last = y, channels
        flat = self.node("Flatten", "flat", "f", x)
        self.node("Gemm", "head", "y", flat, self.weight("wo", channels * 64, 10, fan=channels * 64))
        return [2, 3, 8, 8]

    def mlp(self) -> list[int]:
        x = "x"
        for i in range(int(self.rng.integers(3, 5))):
            y = self.node("MatMul", f"fc{i}", f"m{i}", x, self.weight(f"w{i}", 64, 64, fan=64))
            y = self.node("Add", f"bias{i}", f"s{i}", y, self.weight(f"b{i}", 64, fan=200))
            x = self.node("Relu", f"relu{i}", f"r{i}", y)
        self.node("MatMul", "head", "y", x, self.weight("wo", 64, 10, fan=64))
        return [8, 64]


@functools.cache
def random_net(seed: int) -> tuple[bytes, tuple[dict[str, Array], ...]]:
    """Return a CNN with residual additions, or every third time an MLP, and feeds."""
    net = _Net(seed)
    shape = net.cnn() if seed % 3 else net.mlp()
    graph = helper.make_graph(
        net.nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, [shape[0], 10])],
        [numpy_helper.from_array(a, n) for n, a in net.weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = tuple({"x": net.rng.standard_normal(shape).astype(F)} for _ in range(8))
    return model.SerializeToString(), feeds


def options(calibration: object, decisions: object = None) -> Options:
    return Options(
        target="ort-x86", recipe="int8-static", calibration=calibration, decisions=decisions, guard=False  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass(frozen=True)
class Plant:
    """A build with one wrong range.

    Attributes:
        source: the float model.
        feeds: its data.
        path: the build, with its decisions record beside it.
        value: the value with the wrong range.
        good: the build without.
        factor: what the range was multiplied by.
    """

    source: bytes
    feeds: tuple[dict[str, Array], ...]
    path: Path
    value: str
    good: CompiledModel
    factor: float


def plant(seed: int, folder: Path, factor: float) -> Plant:
    """Build a random net, and again with the range of one value (not the input's) multiplied by a factor."""
    source, feeds = random_net(seed)
    good = compile_model(source, options(list(feeds)))
    ranges = ranges_of(good.model, good.target)
    values = [name for name in ranges if name not in ("x", "f")]
    value = values[int(np.random.default_rng(100 + seed).integers(len(values)))]
    wrong = RangeTable({**ranges.ranges, value: tuple(factor * end for end in ranges.range(value))})  # type: ignore[dict-item]
    path = folder / f"bad{seed}.onnx"
    compile_model(source, options(wrong, good.decisions)).save(path)
    return Plant(source, feeds, path, value, good, factor)

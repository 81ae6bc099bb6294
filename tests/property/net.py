"""Write random ONNX models: a seeded source of choices, and the operators as functions on named values.

Shapes are those of one feed; axis 0 may be open (its length is drawn anew for each feed), other axes only where a
family says so. Weights are scaled so that every layer keeps the size of its input: quantization then behaves as in a
trained model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Attribute = int | float | str | Sequence[int] | onnx.GraphProto


@dataclass(frozen=True)
class T:
    """A value: its name and the shape it has in the feeds (axis 0 of length 1 stands for an open axis too)."""

    name: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def channels(self) -> int:
        return self.shape[1]


@dataclass
class Net:
    """A graph in the making.

    Attributes:
        rng: makes every choice.
        opset: ONNX operator set.
        harsh: also dead channels, outliers and huge biases, shared weights, values of any size.
    """

    rng: np.random.Generator
    opset: int
    harsh: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    count: list[int] = field(default_factory=lambda: [0])

    def body(self) -> Net:
        """Return the writer of a subgraph; its constants go to the outer graph, its names stay distinct."""
        return Net(self.rng, self.opset, self.harsh, [], self.constants, self.count)

    # ---- choices ----------------------------------------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    # ---- values -----------------------------------------------------------------------------------------------

    def fresh(self, stem: str) -> str:
        self.count[0] += 1
        return f"{stem}{self.count[0]}"

    def const(self, array: Any, stem: str = "c") -> str:
        name = self.fresh(stem)
        self.constants[name] = np.asarray(array)
        return name

    def ints(self, *numbers: int) -> str:
        return self.const(np.asarray(numbers, np.int64), "i")

    def scalar(self, number: float) -> str:
        return self.const(np.asarray(number, np.float32), "s")

    def weight(self, shape: Sequence[int], fan: int) -> str:
        """Add a weight whose products keep the variance of what they are applied to; channels differ in size."""
        if self.harsh and self.chance(0.2):
            same = [n for n, a in self.constants.items() if n.startswith("w") and a.shape == tuple(shape)]
            if same:
                return str(self.pick(*same))
        array = self.rng.normal(0, 1 / np.sqrt(fan), tuple(shape))
        spread = self.rng.uniform(0.5, 1.5, (shape[0], *[1] * (len(shape) - 1)))
        if self.harsh:
            spread *= self.rng.choice([0.0, 1e-4, 1.0, 1.0, 30.0], spread.shape)
        return self.const((array * spread).astype(np.float32), "w")

    def vector(self, size: int, low: float = -0.3, high: float = 0.3) -> str:
        array = self.rng.uniform(low, high, size)
        if self.harsh and low < 0:
            array *= self.rng.choice([0.0, 1.0, 1.0, 1e3], size)
        return self.const(array.astype(np.float32), "v")

    # ---- nodes ------------------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Attribute) -> list[str]:
        names = [self.fresh(kind.lower() + "_") for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=self.fresh(f"{kind}."), **attributes))
        return names

    def unary(self, kind: str, x: T, *more: str, shape: Sequence[int] | None = None, **attributes: Attribute) -> T:
        return T(self.op(kind, x.name, *more, **attributes)[0], x.shape if shape is None else tuple(shape))

    def binary(self, kind: str, a: T, b: T | str) -> T:
        names = [a.name, b if isinstance(b, str) else b.name]
        return T(self.op(kind, *(names if self.chance(0.7) else names[::-1]))[0], a.shape)

    # ---- layers -----------------------------------------------------------------------------------------------

    def conv(self, x: T, out: int, kernel: int = 3, stride: int = 1, group: int = 1, bias: bool | None = None) -> T:
        dilation = 2 if kernel == 3 and stride == 1 and min(x.shape[2:]) > 6 and self.chance(0.1) else 1
        weight = self.weight(
            [out, x.channels // group, *[kernel] * (x.rank - 2)], x.channels // group * kernel ** (x.rank - 2)
        )
        inputs = [x.name, weight]
        if self.chance(0.6) if bias is None else bias:
            inputs.append(self.vector(out))
        attributes: dict[str, Attribute] = {"strides": [stride] * (x.rank - 2), "group": group}
        if self.chance(0.8):
            attributes["kernel_shape"] = [kernel] * (x.rank - 2)
        pad = dilation * (kernel - 1) // 2
        if dilation > 1:
            attributes["dilations"] = [dilation] * (x.rank - 2)
        size = [(s + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for s in x.shape[2:]]
        if dilation == 1 and stride == 1 and self.chance(0.1):
            attributes["auto_pad"] = self.pick("SAME_UPPER", "SAME_LOWER")
        else:
            attributes["pads"] = [pad] * 2 * (x.rank - 2)
        return T(self.op("Conv", *inputs, **attributes)[0], (x.shape[0], out, *size))

    def batch_norm(self, x: T) -> T:
        c = x.channels
        more = [self.vector(c, 0.5, 1.5), self.vector(c), self.vector(c), self.vector(c, 0.5, 1.5)]
        return self.unary("BatchNormalization", x, *more)

    def act(self, x: T, *kinds: str) -> T:
        kind = self.pick(
            *(kinds or ("Relu", "Relu", "Relu6", "SiLU", "LeakyRelu", "Sigmoid", "HardSwish", "Tanh", "none"))
        )
        if kind == "none":
            return x
        if kind == "Relu6":
            return self.unary("Clip", x, self.scalar(0.0), self.scalar(6.0))
        if kind == "SiLU":
            return self.binary("Mul", x, self.unary("Sigmoid", x))
        if kind == "LeakyRelu":
            return self.unary("LeakyRelu", x, alpha=0.1)
        if kind == "Gelu":
            return self.gelu(x)
        if kind == "HardSwish" and self.opset < 14:
            kind = "Relu"
        return self.unary(kind, x)

    def gelu(self, x: T) -> T:
        if self.opset >= 20 and self.chance(0.5):
            return self.unary("Gelu", x)
        inner = self.unary("Erf", self.div(x, float(np.sqrt(2))))
        half = self.binary("Mul", x, self.binary("Add", inner, self.scalar(1.0)))
        return self.binary("Mul", half, self.scalar(0.5))

    def div(self, x: T, by: float) -> T:
        return T(self.op("Div", x.name, self.scalar(float(by)))[0], x.shape)

    def linear(self, x: T, out: int) -> T:
        """Multiply by a matrix on the last axis, as Gemm or as MatMul with or without Add."""
        size = x.shape[-1]
        shape = (*x.shape[:-1], out)
        if x.rank == 2 and self.chance(0.5):
            turned = self.chance(0.6)
            w = self.weight([out, size] if turned else [size, out], size)
            more = [self.vector(out)] if self.chance(0.8) else []
            attributes: dict[str, Attribute] = {"transB": 1} if turned else {}
            if self.chance(0.15):
                attributes["alpha"] = 0.5
            return self.unary("Gemm", x, w, *more, shape=shape, **attributes)
        made = self.unary("MatMul", x, self.weight([size, out], size), shape=shape)
        return self.binary("Add", made, self.vector(out)) if self.chance(0.7) else made

    def layer_norm(self, x: T) -> T:
        size = x.shape[-1]
        if self.opset >= 17 and self.chance(0.5):
            return self.unary("LayerNormalization", x, self.vector(size, 0.5, 1.5), self.vector(size), axis=-1)
        centred = T(self.op("Sub", x.name, self.mean(x).name)[0], x.shape)
        square = self.unary("Pow", centred, self.scalar(2.0))
        spread = self.unary("Sqrt", self.binary("Add", self.mean(square), self.scalar(1e-5)))
        normed = T(self.op("Div", centred.name, spread.name)[0], x.shape)
        return self.binary("Add", self.binary("Mul", normed, self.vector(size, 0.5, 1.5)), self.vector(size))

    def mean(self, x: T) -> T:
        shape = (*x.shape[:-1], 1)
        if self.opset >= 18:
            return self.unary("ReduceMean", x, self.ints(-1), shape=shape)
        return self.unary("ReduceMean", x, shape=shape, axes=[-1])

    def split(self, x: T, axis: int, parts: int) -> list[T]:
        sizes = [x.shape[axis] // parts] * parts
        if self.opset >= 18 and self.chance(0.5):
            names = self.op("Split", x.name, outputs=parts, axis=axis, num_outputs=parts)
        else:
            names = self.op("Split", x.name, self.ints(*sizes), outputs=parts, axis=axis)
        shape = list(x.shape)
        shape[axis] = sizes[0]
        return [T(n, tuple(shape)) for n in names]

    def concat(self, parts: Sequence[T], axis: int) -> T:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return T(self.op("Concat", *(p.name for p in parts), axis=axis)[0], tuple(shape))

    def transpose(self, x: T, perm: Sequence[int]) -> T:
        return self.unary("Transpose", x, shape=[x.shape[p] for p in perm], perm=list(perm))

    def reshape(self, x: T, target: Sequence[int], shape: Sequence[int]) -> T:
        return self.unary("Reshape", x, self.ints(*target), shape=shape)

    def crop(self, x: T, axis: int, start: int, end: int, step: int = 1) -> T:
        shape = list(x.shape)
        shape[axis] = len(range(start, min(end, shape[axis]), step))
        more = [self.ints(start), self.ints(end), self.ints(axis)]
        if step != 1 or self.chance(0.3):
            more.append(self.ints(step))
        return self.unary("Slice", x, *more, shape=shape)


def make_model(
    net: Net,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[tuple[str, int]],
    types: dict[str, int] | None = None,
) -> onnx.ModelProto:
    """Return the checked model; outputs are (name, rank)."""
    made = [
        helper.make_tensor_value_info(n, (types or {}).get(n, TensorProto.FLOAT), [f"{n}_{i}" for i in range(rank)])
        for n, rank in outputs
    ]
    read = {name for node in net.nodes for name in (*node.input, *_captured(node))}
    weights = [numpy_helper.from_array(a, n) for n, a in net.constants.items() if n in read]
    graph = helper.make_graph(net.nodes, "random", list(inputs), made, weights)
    imports = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8 if net.opset < 19 else 10)
    onnx.checker.check_model(model, full_check=True)
    return model


def _captured(node: onnx.NodeProto) -> list[str]:
    found = []
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found += [*inner.input, *_captured(inner)]
    return found

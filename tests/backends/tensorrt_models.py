"""Small quantized models for the tests of the TensorRT backend, as TensorRT wants them: int8, zero point 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


@dataclass
class Maker:
    """Nodes and initializers of a float32 model."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}:out"], name=name, **attributes))
        return f"{name}:out"

    def pair(self, x: str, name: str, scale: float = 0.05) -> str:
        numbers = [self.constant(f"{name}:s", np.float32(scale)), self.constant(f"{name}:z", np.int8(0))]
        stored = self.op("QuantizeLinear", [x, *numbers], f"{name}/QuantizeLinear")
        return self.op("DequantizeLinear", [stored, *numbers], f"{name}/DequantizeLinear")

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        stored = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        numbers = [
            self.constant(f"{name}:w", stored),
            self.constant(f"{name}:ws", np.full(shape[axis], 0.01, np.float32)),
            self.constant(f"{name}:wz", np.zeros(shape[axis], np.int8)),
        ]
        return self.op("DequantizeLinear", numbers, f"{name}/DequantizeLinear_1", axis=axis)

    def conv(self, x: str, name: str, channels: int = 8) -> str:
        return self.op("Conv", [x, self.weight(name, (channels, channels, 3, 3), 0)], name, pads=[1] * 4)

    def proto(self, inputs: dict[str, list[int | str]], output: str, opset: int = 21) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def two_convolutions(batch: int | str = 1) -> onnx.ModelProto:
    """Return Conv, Relu, Conv, both on 8 bits."""
    maker = Maker()
    y = maker.op("Relu", [maker.conv(maker.pair("x", "first"), "conv1")], "relu")
    return maker.proto({"x": [batch, 8, 16, 16]}, maker.conv(maker.pair(y, "second"), "conv2"))


def half_quantized() -> onnx.ModelProto:
    """Return an int8 MatMul, then one whose weight alone is quantized, then one with its scales along K."""
    maker = Maker()
    y = maker.op("MatMul", [maker.pair("x", "first"), maker.weight("both", (64, 64), 1)], "both")
    y = maker.op("MatMul", [y, maker.weight("weight", (64, 64), 1)], "weight")
    y = maker.op("MatMul", [maker.pair(y, "third"), maker.weight("along_k", (64, 64), 0)], "along_k")
    return maker.proto({"x": [4, 64]}, y)

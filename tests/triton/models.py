"""Small models for the executor's tests, and their compilation."""

import numpy as np
import onnx
from onnx import TensorProto, helper

import qcompiler
from qcompiler.compiled import CompiledModel
from qcompiler.engine import Array


def _constant(name: str, *shape: int, scale: float = 0.3) -> onnx.TensorProto:
    rng = np.random.default_rng(list(name.encode()))
    return onnx.numpy_helper.from_array((rng.normal(size=shape) * scale).astype(np.float32), name)


def _model(nodes: list, inputs: list, outputs: list, constants: list, opset: int = 21) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def residual_cnn() -> onnx.ModelProto:
    """Two convolutions and a residual sum, a depthwise one, a pool, a classifier."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"], name="r1"),
        node("Conv", ["r1", "w2", "b1"], ["c2"], name="c2", pads=[1, 1, 1, 1]),
        node("Add", ["c2", "r1"], ["s"], name="s"),
        node("Relu", ["s"], ["r2"], name="r2"),
        node("Conv", ["r2", "w3"], ["c3"], name="c3", pads=[1, 1, 1, 1], group=16, strides=[2, 2]),
        node("HardSwish", ["c3"], ["h"], name="h"),
        node("MaxPool", ["h"], ["m"], name="m", kernel_shape=[2, 2], strides=[2, 2]),
        node("Conv", ["m", "w4"], ["c4"], name="c4"),
        node("GlobalAveragePool", ["c4"], ["g"], name="g"),
        node("Flatten", ["g"], ["f"], name="f"),
        node("Gemm", ["f", "w5", "b5"], ["y"], name="y"),
    ]
    constants = [
        _constant("w1", 16, 3, 3, 3), _constant("b1", 16), _constant("w2", 16, 16, 3, 3, scale=0.1),
        _constant("w3", 16, 1, 3, 3), _constant("w4", 32, 16, 1, 1), _constant("w5", 32, 10), _constant("b5", 10),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    return _model(nodes, [x], [y], constants)


def silu_cnn(extra: bool = False) -> onnx.ModelProto:
    """Two convolutions with x * sigmoid(x) behind each, once the other way round; ``extra`` reads x once more."""
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c1"], name="c1", pads=[1, 1, 1, 1]),
        node("Sigmoid", ["c1"], ["s1"], name="s1"),
        node("Mul", ["c1", "s1"], ["m1"], name="m1"),
        node("Conv", ["m1", "w2"], ["c2"], name="c2"),
        node("Sigmoid", ["c2"], ["s2"], name="s2"),
        node("Mul", ["s2", "c2"], ["m2"], name="m2"),
        node("Add", ["m2", "c2"], ["a2"], name="a2"),
        node("GlobalAveragePool", ["a2" if extra else "m2"], ["g"], name="g"),
        node("Flatten", ["g"], ["f"], name="f"),
        node("Gemm", ["f", "w5", "b5"], ["y"], name="y"),
    ]
    constants = [
        _constant("w1", 16, 3, 3, 3), _constant("b1", 16), _constant("w2", 32, 16, 1, 1), _constant("w5", 32, 10),
        _constant("b5", 10),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])
    return _model([n for n in nodes if extra or n.name != "a2"], [x], [y], constants)


def mlp_block() -> onnx.ModelProto:
    """Norm, product, gelu, product, residual sum, norm, classifier; any number of rows."""
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["x", "g1", "b1"], ["n1"], name="n1"),
        node("MatMul", ["n1", "w1"], ["p1"], name="p1"),
        node("Add", ["p1", "c1"], ["a1"], name="a1"),
        node("Gelu", ["a1"], ["e1"], name="e1"),
        node("MatMul", ["e1", "w2"], ["p2"], name="p2"),
        node("Add", ["p2", "x"], ["s"], name="s"),
        node("LayerNormalization", ["s", "g1", "b1"], ["n2"], name="n2"),
        node("MatMul", ["n2", "w3"], ["y"], name="y"),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.ones(32, np.float32), "g1"), _constant("b1", 32), _constant("w1", 32, 64),
        _constant("c1", 64), _constant("w2", 64, 32), _constant("w3", 32, 16),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", 32])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "t", 16])
    return _model(nodes, [x], [y], constants)


def feeds(count: int, *shape: int) -> list[dict[str, Array]]:
    rng = np.random.default_rng(11)
    return [{"x": rng.normal(size=shape).astype(np.float32)} for _ in range(count)]


def compiled(model: onnx.ModelProto, calibration: list[dict[str, Array]], recipe: str = "int8-static") -> CompiledModel:
    return qcompiler.compile(model, target="triton-sm90", recipe=recipe, calibration=calibration or None, guard=False)

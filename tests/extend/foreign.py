"""Models as other people have them: constants as nodes, functions, old operator sets, names used twice, old files."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.calibration.readers import random_feeds
from qcompiler.engine import Array, EngineOptions, Feeds

_F = np.float32


def _model(text: str, **weights: Array) -> onnx.ModelProto:
    """Return a parsed model whose named weights are initializers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def transformer_block() -> onnx.ModelProto:
    """Return a decomposed LayerNormalization, a GELU and two products at opset 17; its constants are nodes."""
    r = np.random.default_rng(5)
    text = """<ir_version: 8, opset_import: ["" : 17]> block (float[N,3,16] x) => (float[N,3,16] y) {
      m = ReduceMean <axes = [-1], keepdims = 1> (x)
      d = Sub (x, m)
      two = Constant <value_float = 2.0> ()
      s = Pow (d, two)
      v = ReduceMean <axes = [-1], keepdims = 1> (s)
      eps = Constant <value = float {0.00001}> ()
      ve = Add (v, eps)
      q = Sqrt (ve)
      n = Div (d, q)
      ng = Mul (n, gain)
      nb = Add (ng, shift)
      h = MatMul (nb, w1)
      root = Constant <value = float {1.41421354}> ()
      g1 = Div (h, root)
      g2 = Erf (g1)
      one = Constant <value_float = 1.0> ()
      g3 = Add (g2, one)
      g4 = Mul (h, g3)
      half = Constant <value = float {0.5}> ()
      g = Mul (g4, half)
      t1 = Transpose <perm = [0, 2, 1]> (g)
      t2 = Transpose <perm = [0, 2, 1]> (t1)
      p = MatMul (t2, w2)
      c = Cast <to = 11> (p)
      i = Cast <to = 1> (c)
      z = Identity (i)
      y = Add (z, x)
    }"""
    return _model(
        text, gain=r.random(16).astype(_F), shift=r.random(16).astype(_F), w1=r.standard_normal((16, 32)).astype(_F),
        w2=r.standard_normal((32, 16)).astype(_F),
    )  # fmt: skip


def convolutions() -> onnx.ModelProto:
    """Return Pad, Conv, BatchNormalization, SiLU, Flatten and Gemm at opset 9."""
    r = np.random.default_rng(6)
    text = """<ir_version: 6, opset_import: ["" : 9]> net (float[N,3,8,8] x) => (float[N,5] y) {
      a = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x)
      b = Conv <kernel_shape = [3, 3]> (a, w)
      c = BatchNormalization (b, scale, bias, mean, var)
      s = Sigmoid (c)
      d = Mul (c, s)
      e = GlobalAveragePool (d)
      f = Flatten (e)
      g = Dropout (f)
      y = Gemm <transB = 1> (g, v, u)
    }"""
    return _model(
        text, w=r.standard_normal((4, 3, 3, 3)).astype(_F), scale=r.random(4).astype(_F), bias=r.random(4).astype(_F),
        mean=r.random(4).astype(_F), var=(r.random(4) + 1).astype(_F), v=r.standard_normal((5, 4)).astype(_F),
        u=r.random(5).astype(_F),
    )  # fmt: skip


def old_file() -> onnx.ModelProto:
    """Return a model of IR version 3, in which every weight is an input as well."""
    model = convolutions()
    model.ir_version = 3
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 8))
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def with_function() -> onnx.ModelProto:
    """Return a model that calls a local function, between what passes can simplify."""
    text = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
    calls (float[N,4] x) => (float[N,4] y) {
      a = Identity (x)
      b = local.twice (a)
      c = Neg (b)
      d = Mul (c, one)
      y = Relu (d)
    }
    <domain: "local", opset_import: ["" : 18]>
    twice (p) => (q) {
      m = ReduceMax <keepdims = 1> (p)
      s = Add (p, m)
      q = Add (s, p)
    }"""
    return _model(text, one=np.array(1, _F))


def branches() -> onnx.ModelProto:
    """Return an If whose branches use the same names for values and nodes, one of them nameless."""

    def branch(name: str, op: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("Identity", ["x"], ["inner"], name="same"),
            helper.make_node("Constant", [], ["k"], value_float=1.0),
            helper.make_node("Mul", ["inner", "k"], ["scaled"]),
            helper.make_node(op, ["scaled"], ["out"], name="last"),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 4])])

    nodes = [
        helper.make_node(
            "If", ["c"], ["picked"], then_branch=branch("then", "Relu"), else_branch=branch("else", "Neg")
        ),
        helper.make_node("Identity", ["picked"], ["y"], name="same"),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
         helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def shapes() -> onnx.ModelProto:
    """Return shape arithmetic and reshapes at opset 13, with equal constants."""
    text = """<ir_version: 7, opset_import: ["" : 13]> shapes (float[2,3,4] x) => (float[2,12] y) {
      s = Shape (x)
      zero = Constant <value = int64 {0}> ()
      n = Gather <axis = 0> (s, zero)
      axes = Constant <value_ints = [0]> ()
      n1 = Unsqueeze (n, axes)
      rest = Constant <value_ints = [-1]> ()
      target = Concat <axis = 0> (n1, rest)
      a = Reshape (x, flat)
      b = Reshape (a, flat2)
      c = Add (k, b)
      d = Reshape (c, target)
      y = Cast <to = 1> (d)
    }"""
    flat = np.array([6, 4], np.int64)
    return _model(text, flat=flat, flat2=flat.copy(), k=np.ones((6, 4), _F))


MODELS = {
    "transformer-block": transformer_block,
    "convolutions": convolutions,
    "old-file": old_file,
    "with-function": with_function,
    "branches": branches,
    "shapes": shapes,
}


def outputs(model: bytes, feeds: Feeds) -> dict[str, Array]:
    """Run a model on ONNX Runtime, its own optimizations off."""
    return OrtEngine().load(model, EngineOptions(optimize=False)).run(feeds)


def feeds_of(model: onnx.ModelProto, number: int = 2) -> list[Feeds]:
    """Return random feeds for the inputs that have no default."""
    free = onnx.ModelProto()
    free.CopyFrom(model)
    named = {t.name for t in model.graph.initializer}
    kept = [i for i in free.graph.input if i.name not in named]
    del free.graph.input[:]
    free.graph.input.extend(kept)
    free.ir_version = max(free.ir_version, 4)
    inputs = OrtEngine().load(free.SerializeToString(), EngineOptions(optimize=False)).inputs
    return list(random_feeds(inputs, number))


def to_text(model: ir.Model) -> bytes:
    """Return what a file of the model holds."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))

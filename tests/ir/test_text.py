from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.ir.graph import ORIGIN
from qcompiler.ir.text import parse_text, print_graph, print_model, tensor_text

TEXT = """<ir_version: 10, opset_import: ["" : 21, "qcompiler" : 1]>
main (float[N,4] x, bool c) => (float[N,2] y)
<float[4,2] w = {1,2,3,4,5,6,7,8}, float half = {0.5}, int64[2] s = {-1,2}>
{
  [mm] h = MatMul(x, w)
  [sc] k = Mul(h, half)
  [clip] m = Clip(k, "", half)
  [fn] f = qcompiler.same<rate = 2>(m)
  [branch] y = If (c) <
    then_branch = t () => (float[N,2] a) { [rs] a = Reshape<allowzero = 0>(f, s) },
    else_branch = e () => (float[N,2] b) { [id] b = Identity(f) }>
}
<domain: "qcompiler", opset_import: ["" : 21]> same<rate>(p) => (q) { [inner] q = Identity(p) }
"""

EXPECTED = """model opset onnx 21, qcompiler 1
graph main(%x: f32 Nx4, %c: bool scalar) -> (%y: f32 Nx2) {
  mm: %h: f32 Nx2 = MatMul(%x, const<f32 4x2 #ef81>)
  sc: %k: f32 Nx2 = Mul(%h, const<f32 0.5>)
  clip: %m: f32 Nx2 = Clip(%k, _, const<f32 0.5>)
  fn: %f: f32 Nx2 = qcompiler::same(%m) {rate=2}
  branch: %y: f32 Nx2 = If(%c) [  # from a, b
    else_branch() -> (%b: f32 Nx2) {
      id: %b: f32 Nx2 = Identity(%f)
    }
    then_branch() -> (%a: f32 Nx2) {
      rs: %a: f32 Nx2 = Reshape(%f, const<i64 2 [-1, 2]>) {allowzero=0}
    }
  ]
}
function qcompiler::same<rate>(%p: ?) -> (%q: ?) {
  inner: %q: ? = Identity(%p)
}
"""


def test_the_whole_syntax() -> None:
    model = parse_text(TEXT)
    model.graph.node("branch").metadata_props[ORIGIN] = "a;b"
    assert print_model(model) == EXPECTED
    assert EXPECTED.startswith(f"model opset onnx 21, qcompiler 1\n{print_graph(model.graph)}")


def test_equal_models_print_equal_and_a_changed_weight_shows() -> None:
    first, second, third = parse_text(TEXT), parse_text(TEXT), parse_text(TEXT.replace("7,8}", "7,9}"))
    assert print_model(first) == print_model(second)
    changed = set(print_model(third).splitlines()) - set(print_model(first).splitlines())
    assert len(changed) == 1
    assert "MatMul" in changed.pop()


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (ir.Tensor(np.float32(0.1)), "const<f32 0.1>"),
        (ir.Tensor(np.array([1, -2], np.int64)), "const<i64 2 [1, -2]>"),
        (ir.Tensor(np.array([[True]])), "const<bool 1x1 [True]>"),
        (ir.Tensor(np.zeros((0,), np.float32)), "const<f32 0 []>"),
        (ir.Tensor(np.float16(0.1)), "const<f16 0.1>"),
        (ir.Tensor(np.arange(3, dtype=np.uint8), dtype=ir.DataType.UINT8), "const<u8 3 [0, 1, 2]>"),
        (ir.StringTensor(np.array([b"a b"], object)), "const<str 1 ['a b']>"),
    ],
)
def test_short_constants_show_their_values(tensor: ir.TensorProtocol, text: str) -> None:
    assert tensor_text(tensor) == text


def test_a_constant_output_and_an_omitted_output_are_shown() -> None:
    model = parse_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[1,1,4,4] x) => (float[1,1,2,2] y, float[2] k)
        <float[2] k = {1, 2}> { y, i = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x) }"""
    )
    model.graph[0].outputs[1].name = ""
    lines = print_model(model).splitlines()
    assert lines[2] == ("  MaxPool_0: %y: f32 1x1x2x2, _ = MaxPool(%x) {kernel_shape=[2, 2], strides=[2, 2]}")
    assert lines[3] == "  %k: f32 2 = const<f32 2 [1.0, 2.0]>"


def test_text_keeps_its_opset() -> None:
    model = parse_text('<ir_version: 8, opset_import: ["" : 11]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    assert model.opset_imports[""] == 11


def test_bad_text_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="not ONNX text"):
        parse_text("g (float x) -> y")

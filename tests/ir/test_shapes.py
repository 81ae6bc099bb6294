from __future__ import annotations

import onnx_ir as ir
import pytest

from qcompiler.errors import ModelError
from qcompiler.ir.shapes import element_count, fix_shapes, infer_shapes, static_dim, static_shape
from qcompiler.ir.text import parse_text

HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def test_values_flow_through_shape_computations() -> None:
    model = parse_text(
        f"""{HEAD} g (float[2,3,8] x) => (float[A,B] y) <int64[1] m = {{-1}}, int64[1] z = {{0}}>
        {{ s = Shape(x) a = Gather<axis = 0>(s, z) t = Concat<axis = 0>(a, m) y = Reshape(x, t) }}"""
    )
    assert static_shape(model.graph.outputs[0]) == (2, 24)


def test_known_shapes_win_when_trusted_and_fill_gaps_when_not() -> None:
    text = f"""{HEAD} g (float[2,3] x) => (float[2,3] y) <float[5,7] h, float[2,3] k>
        {{ h = Relu(x) k = com.microsoft.Gelu(h) y = Relu(k) }}"""
    model = parse_text(text)
    assert static_shape(value(model, "h")) == (2, 3)  # import does not trust a stale note
    assert static_shape(value(model, "k")) == (2, 3)  # inference knows nothing: the note stays
    value(model, "h").shape = ir.Shape([9, 9])
    assert infer_shapes(model) == 0
    assert static_shape(value(model, "h")) == (9, 9)


def test_inference_reports_what_it_gained() -> None:
    model = parse_text(f"{HEAD} g (float[2,3] x) => (float[2,3] y) {{ h = Relu(x) k = Neg(h) y = Relu(k) }}")
    for name in ("h", "k"):
        value(model, name).shape = None
    value(model, "k").type = None
    assert infer_shapes(model) == 2
    assert static_shape(value(model, "k")) == (2, 3)
    assert value(model, "k").dtype == ir.DataType.FLOAT
    assert infer_shapes(model) == 0


def test_bodies_get_shapes_and_made_up_names_vanish() -> None:
    model = parse_text(
        f"""{HEAD} g (float[2,3] x, bool c) => (float[A] y) {{ y = If (c) <
            then_branch = t () => (float[U] a) {{ k = Relu(x) m = NonZero(k) n = Cast<to = 1>(m)
                                                a = ReduceSum<keepdims = 0>(n) }},
            else_branch = e () => (float[V] b) {{ b = Flatten(x) }}> }}"""
    )
    body = model.graph[0].attributes["then_branch"].as_graph()
    assert [str(v.shape) for node in body for v in node.outputs][:2] == ["[2,3]", "[2,None]"]


def test_weights_survive_inference_untouched() -> None:
    numbers = ",".join(str(i) for i in range(400))
    model = parse_text(
        f"{HEAD} g (float[1,20] x) => (float[1,20] y) <float[20,20] w = {{{numbers}}}> {{ y = MatMul(x, w) }}"
    )
    tensor = model.graph.initializers["w"].const_value
    infer_shapes(model)
    assert model.graph.initializers["w"].const_value is tensor
    assert tensor is not None
    assert tensor.numpy()[-1, -1] == 399


def test_sizes() -> None:
    model = parse_text(f"{HEAD} g (float[N,3,4] x) => (float[N,3,4] y) {{ y = Relu(x) }}")
    x = model.graph.inputs[0]
    assert (static_dim(x, 0), static_dim(x, -1), static_dim(x, 3), static_dim(None, 0)) == (None, 4, None, None)
    assert (element_count(x), element_count(x, 5), static_shape(x)) == (None, 60, None)


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"q": [1]}, r"no input named 'q' .*inputs are x: Nx3, z: N$"),
        ({"x": [1]}, r"input 'x': expected rank 2, found 1; inputs are x: Nx3, z: N"),
        ({"x": [1, 4]}, r"input 'x': expected Nx3, found 1x4; the model fixes that axis"),
        ({"x": [1, 3], "z": [2]}, r"axis 'N' is given two lengths, 1 and 2"),
        ({"x": [-2, 3]}, r"negative"),
    ],
)
def test_wrong_shapes_are_refused(shapes: dict[str, list[int]], reason: str) -> None:
    model = parse_text(f"{HEAD} g (float[N,3] x, float[N] z) => (float[N,3] y) {{ y = Relu(x) }}")
    with pytest.raises(ModelError, match=reason):
        fix_shapes(model, shapes)


def test_an_input_of_unknown_rank_takes_any_shape() -> None:
    model = parse_text(f"{HEAD} g (float[N] x) => (int64[M] y) {{ h = Relu(x) y = Shape(h) }}")
    model.graph.inputs[0].shape = None
    fix_shapes(model, {"x": [2, -1]})
    infer_shapes(model, trust=False)
    assert str(value(model, "h").shape) == "[2,None]"

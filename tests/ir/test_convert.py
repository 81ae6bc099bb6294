from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, parser

from qcompiler.errors import ModelError
from qcompiler.ir.importer import import_model
from qcompiler.ir.opset import min_opset, set_opset
from qcompiler.ir.schemas import NOTE
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir.softmax import undo_softmax_expansion
from qcompiler.ir.text import parse_text

X = np.random.default_rng(0).standard_normal((1, 2, 4, 4)).astype(np.float32)

OLD_NODES = [
    (7, 'y = Pad<mode = "constant", value = 1.5, pads = [0, 0, 1, 1, 0, 0, 2, 0]>(x)'),
    (7, 'y = Pad<mode = "reflect", pads = [0, 0, 1, 1, 0, 0, 2, 0]>(x)'),
    (7, "y = Clip<min = -0.5, max = 0.3>(x)"),
    (7, "y = Clip<min = -0.5>(x)"),
    (7, "y = Dropout<ratio = 0.3>(x)"),
    (7, "y, i = TopK<k = 2, axis = 2>(x)"),
    (10, "k = Constant<value = int64[1] {2}>() y, i = TopK<axis = 1>(x, k)"),
    (7, "y = Slice<axes = [2, 3], starts = [0, 1], ends = [3, -1]>(x)"),
    (7, "y = ReduceSum<axes = [2], keepdims = 1>(x)"),
    (11, "y = ReduceSum<axes = [-1], keepdims = 0>(x)"),
    (12, "y = ReduceMean(x)"),
    (13, "y = ReduceMax<axes = [1, 2]>(x)"),
    (7, "y = Squeeze<axes = [0]>(x)"),
    (11, "y = Unsqueeze<axes = [0, -1]>(x)"),
    (7, "a, b = Split<axis = 3, split = [1, 3]>(x) y = Concat<axis = 3>(b, a)"),
    (7, "a, b = Split<axis = 3>(x) y = Concat<axis = 3>(b, a)"),
    (13, "a, b = Split<axis = 3>(x) y = Concat<axis = 3>(b, a)"),
    (7, "y = Hardmax<axis = 2>(x)"),
    (7, "y = LogSoftmax(x)"),
    (12, "y = Softmax<axis = -2>(x)"),
    (7, "s = Constant<value = float[2] {1.0, 2.0}>() y = BatchNormalization<epsilon = 0.1>(x, s, s, s, s)"),
    (18, "s = Constant<value = float[2] {1.0, 2.0}>() y = GroupNormalization<num_groups = 2>(x, s, s)"),
    (7, "y = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(x)"),
    (10, "y = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(x)"),
    (7, 'y = Upsample<mode = "nearest", scales = [1.0, 1.0, 2.0, 3.0]>(x)'),
    (8, 'y = Upsample<mode = "linear", scales = [1.0, 1.0, 2.0, 2.0]>(x)'),
    (9, 's = Constant<value = float[4] {1.0, 1.0, 2.0, 2.0}>() y = Upsample<mode = "linear">(x, s)'),
    (10, 's = Constant<value = float[4] {1.0, 1.0, 0.6, 0.5}>() y = Resize<mode = "nearest">(x, s)'),
    (10, 's = Constant<value = float[4] {1.0, 1.0, 0.6, 0.5}>() y = Resize<mode = "linear">(x, s)'),
    (10, 's = Constant<value = float[4] {1.0, 1.0, 1.6, 2.5}>() y = Resize<mode = "nearest">(x, s)'),
    (
        9,
        "i = Constant<value = int64[1, 1, 1, 2] {0, 2}>() u = Constant<value = float[1, 1, 1, 2] {9.0, 8.0}>() "
        "y = Scatter<axis = 3>(x, i, u)",
    ),
    (
        16,
        'g = Constant<value = float[1, 1, 1, 2] {0.2, -0.3}>() y = GridSample<mode = "bilinear">(x, g)',
    ),
    (
        10,
        "r = Constant<value = float[1, 4] {0.3, 0.6, 3.2, 2.1}>() i = Constant<value = int64[1] {0}>() "
        "y = RoiAlign<output_height = 3, output_width = 3, sampling_ratio = 2>(x, r, i)",
    ),
]


def run(model: bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options).run(None, feeds)[0]


@pytest.mark.parametrize(("opset", "body"), OLD_NODES, ids=lambda v: str(v)[-40:])
def test_an_old_operator_means_the_same_at_the_internal_opset(opset: int, body: str) -> None:
    proto = parser.parse_model(
        f'<ir_version: 4, opset_import: ["" : {opset}]> g (float[1,2,4,4] x) => (float y) {{ {body} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = import_model(proto)
    assert model.opset_imports[""] == 21
    assert NOTE not in model.metadata_props
    before, after = run(proto.SerializeToString(), {"x": X}), run(to_bytes(model), {"x": X})
    assert before.shape == after.shape
    # Rewritten sums may be ordered differently: a few units in the last place of the largest value.
    assert np.abs(before - after).max() <= 8 * np.finfo(np.float32).eps * np.abs(before).max()


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(
    ("shape", "attribute", "axis"),
    [
        ("2,3", "", -1),
        ("2,3,4", "<axis = 2>", -1),
        ("N,M", "<axis = -1>", -1),
        ("1,10,1,1", "<axis = 1>", -3),
        ("N,10,1,1", "", -3),
        ("2,1,1", "<axis = 1>", -1),
        ("2,3,4", "<axis = 1>", None),
        ("2,N,M", "<axis = 1>", None),
    ],
)
def test_an_old_softmax_is_plain_where_it_means_the_same(
    op_type: str, shape: str, attribute: str, axis: int | None
) -> None:
    model = import_model(
        parser.parse_model(
            f"""<ir_version: 4, opset_import: ["" : 11]> g (float[{shape}] x) => (float[{shape}] y)
            {{ y = {op_type}{attribute}(x) }}"""
        )
    )
    if axis is None:
        assert [n.op_type for n in model.graph] == ["Shape", "Flatten", op_type, "Reshape"]
    else:
        assert [n.op_type for n in model.graph] == [op_type]
        assert model.graph[0].attributes["axis"].as_int() == axis
        assert model.graph[0].name == f"{op_type}_0"
    assert model.graph.outputs[0].name == "y"


def test_an_expansion_whose_parts_are_used_elsewhere_stays() -> None:
    text = """<ir_version: 8, opset_import: ["" : 21]> g (float[2,3] x) => (float[2,3] y, float[2,3] f, int64[2] s) {
        s = Shape(x) f = Flatten<axis = 1>(x) h = Softmax(f) y = Reshape(h, s) }"""
    model = parse_text(text)
    undo_softmax_expansion(model)
    assert [n.op_type for n in model.graph] == ["Shape", "Flatten", "Softmax", "Reshape"]
    shape_used = parse_text(text.replace(", float[2,3] f", ""))
    undo_softmax_expansion(shape_used)
    assert [n.op_type for n in shape_used.graph] == ["Shape", "Softmax"]
    assert [v.name for v in shape_used.graph.outputs] == ["y", "s"]


def test_bodies_are_converted_too() -> None:
    proto = parser.parse_model(
        """<ir_version: 7, opset_import: ["" : 11]> g (float[2,3] x, bool c) => (float[2] y) {
          y = If (c) <
            then_branch = t () => (float[2] a) { a = ReduceSum<axes = [1], keepdims = 0>(x) },
            else_branch = e () => (float[2] b) { u = Unsqueeze<axes = [0]>(x) v = Squeeze<axes = [0]>(u)
                                                 b = ReduceMax<axes = [-1], keepdims = 0>(v) }>
        }"""
    )
    model = import_model(proto)
    x = np.array([[1, 2, 3], [4, 5, 9]], np.float32)
    for flag, expected in ((True, [6, 18]), (False, [3, 9])):
        np.testing.assert_array_equal(run(to_bytes(model), {"x": x, "c": np.array(flag)}), expected)


def test_a_node_without_conversion_keeps_the_model_at_its_opset() -> None:
    proto = parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 8]> g (float s, float[1,3,2] x) => (float o, float[1,3,2] z) {
          o, z = Scan <num_scan_inputs = 1, body = b (float a, float[2] e) => (float c, float[2] d)
            { c = Identity(a) d = Relu(e) }> ("", s, x)
        }"""
    )
    model = import_model(proto)
    assert model.opset_imports[""] == 8
    assert model.metadata_props[NOTE] == "kept at opset 8: Scan 'Scan_0' has no conversion from opset 8"


def test_a_resize_that_grows_and_shrinks_keeps_its_opset() -> None:
    proto = parser.parse_model(
        """<ir_version: 4, opset_import: ["" : 10]> g (float[1,2,4,4] x) => (float[1,2,N,M] y)
        { s = Constant<value = float[4] {1.0, 1.0, 2.0, 0.5}>() y = Resize<mode = "nearest">(x, s) }"""
    )
    model = import_model(proto)
    assert model.opset_imports[""] == 10
    np.testing.assert_array_equal(run(to_bytes(model), {"x": X}), run(proto.SerializeToString(), {"x": X}))


def test_an_opset_before_seven_is_converted_or_refused() -> None:
    good = parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 6]> g (float[2,3] x, float[3] b) => (float[2,3] y)
        { y = Add<axis = 1, broadcast = 1>(x, b) }"""
    )
    assert import_model(good).opset_imports[""] == 21
    bad = parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 1]> g (float[2,3] x, float t, float a) => (float[4,3] y)
        { [n] y = Tile(x, t, a) }"""
    )
    with pytest.raises(ModelError, match=r"opset 1 is older than 7 .*'n'.*export the model again"):
        import_model(bad)


def test_a_newer_opset_stays() -> None:
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[2,3] x) => (float[2,3] y) { y = Identity(x) }'
    assert import_model(parser.parse_model(text)).opset_imports[""] == 23


@pytest.mark.parametrize(
    ("body", "least"),
    [
        ("y = Relu(x)", 13),
        ("y = LayerNormalization(x, w)", 17),
        ("y = Gelu(x)", 20),
        ("h = Transpose(x) y = Identity(h)", 13),
        ("y = ReduceMean(x)", 13),
        ("a = Constant<value = int64[1] {1}>() y = ReduceMean(x, a)", 18),
        ("s = Constant<value = int64[2] {4, 2}>() y = Reshape<allowzero = 0>(x, s)", 13),
        ("s = Constant<value = int64[2] {4, 2}>() y = Reshape<allowzero = 1>(x, s)", 14),
        ("a, b = Split<num_outputs = 2>(x) y = Relu(a)", 18),
        ("y = LeakyRelu(x)", 13),
    ],
)
def test_the_least_opset_that_means_the_same(body: str, least: int) -> None:
    model = parse_text(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (float[A,B] y)
        <float[4] w = {{1, 2, 3, 4}}> {{ {body} }}"""
    )
    assert min_opset(model) == least
    before = run(to_bytes(model), {"x": np.abs(X.reshape(8, 4)[:2])})
    set_opset(model, least)
    assert model.opset_imports[""] == least
    np.testing.assert_array_equal(run(to_bytes(model), {"x": np.abs(X.reshape(8, 4)[:2])}), before)


def test_element_types_hold_a_node_at_its_opset() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (%s[2] x) => (%s[2] y) { y = Identity(x) }"""
    assert min_opset(parse_text(text % ("float", "float"))) == 13
    assert min_opset(parse_text(text % ("float8e4m3fn", "float8e4m3fn"))) == 19
    assert min_opset(parse_text(text % ("int4", "int4"))) == 21


def test_lowering_names_the_node_that_prevents_it() -> None:
    model = parse_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[2,4] x) => (float[2,4] y)
        { h = Relu(x) [here] y = Gelu(h) }"""
    )
    with pytest.raises(ModelError, match="cannot lower the model to opset 17: Gelu 'here' needs at least 20"):
        set_opset(model, 17)
    assert model.opset_imports[""] == 21


def test_raising_again_converts() -> None:
    model = parse_text(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2,4] x) => (float[2] y)
        { y = ReduceMax<axes = [1], keepdims = 0>(x) }"""
    )
    set_opset(model, 18)
    assert len(model.graph[0].inputs) == 2
    assert model.opset_imports[""] == 18


def test_the_file_format_version_follows_the_element_types() -> None:
    text = '<ir_version: 10, opset_import: ["" : 21]> g (%s[2] x) => (%s[2] y) { y = Identity(x) }'
    plain, packed = parse_text(text % ("float", "float")), parse_text(text % ("int4", "int4"))
    set_opset(plain, 13)
    set_opset(packed, 21)
    assert (plain.ir_version, packed.ir_version) == (7, 10)
    assert plain.graph.inputs[0].dtype == TensorProto.FLOAT

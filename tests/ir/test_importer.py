from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from qcompiler.errors import ModelError
from qcompiler.ir.graph import ORIGIN, all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.serialize import to_bytes

LINEAR = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N,4] x) => (float[N,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }"""


def run(model: bytes, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(model, options).run(None, feeds)


def test_every_kind_of_source_gives_the_same_model(tmp_path: Path) -> None:
    proto = parser.parse_model(LINEAR)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    sources = [path, str(path), proto.SerializeToString(), proto, ir.serde.deserialize_model(proto)]
    written = {to_bytes(import_model(source)) for source in sources}
    assert len(written) == 1
    assert import_model(path).opset_imports[""] == 21


def test_the_given_objects_are_not_changed() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 11]> g (float[2] x) => (float[2] y)
        <float[2] a = {1, 2}> { h = Add(x, a)  y = Softmax<axis = 0>(h) }"""
    )
    before = proto.SerializeToString(deterministic=True)
    import_model(proto)
    assert proto.SerializeToString(deterministic=True) == before
    model = ir.serde.deserialize_model(proto)
    tensor = model.graph.initializers["a"].const_value
    copy = import_model(model)
    copy.graph.initializers["a"].name = "renamed"
    assert tensor is not None
    assert tensor.name == "a"
    assert model.opset_imports[""] == 11


def test_initializers_leave_the_inputs_of_an_old_model() -> None:
    proto = parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 8]>
        g (float[1,4] x, float[4,2] w) => (float[1,2] y) <float[4,2] w = {1,2,3,4,5,6,7,8}> { y = MatMul(x, w) }"""
    )
    model = import_model(proto)
    assert [v.name for v in model.graph.inputs] == ["x"]
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(run(to_bytes(model), {"x": x})[0], [[16, 20]])


def test_names_become_unique_across_subgraphs_and_captures_keep_working() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 11]> g (float[2] x, bool c) => (float[2] y) {
          [n] h = Relu(x)
          [n] y = If (c) <
            then_branch = t () => (float[2] o) { k = Constant<value = float {2.0}>() [n] o = Mul(h, k) },
            else_branch = e () => (float[2] o) { [n] o = Neg(h) }>
        }"""
    )
    model = import_model(proto)
    nodes = [node.name for node in all_nodes(model)]
    values = [v.name for node in all_nodes(model) for v in node.outputs]
    assert len(set(nodes)) == len(nodes) == 4
    assert sorted(values) == ["h", "o", "o_2", "y"]
    assert nodes[0] == "n"
    assert [to_bytes(import_model(proto)) for _ in range(2)] == [to_bytes(model)] * 2
    x = np.array([1.5, -2], np.float32)
    for flag, expected in ((True, [3, 0]), (False, [-1.5, 0])):
        np.testing.assert_array_equal(run(to_bytes(model), {"x": x, "c": np.array(flag)})[0], expected)


def test_unnamed_nodes_are_named_by_operator_and_position() -> None:
    model = import_model(
        parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 21]> g (float[2] x) => (float[2] y)
            { h = Relu(x) [Neg_1] k = Exp(h) y = Neg(k) }"""
        )
    )
    assert [node.name for node in model.graph] == ["Relu_0", "Neg_1", "Neg_2"]
    assert [node.metadata_props[ORIGIN] for node in model.graph] == ["Relu_0", "Neg_1", "Neg_2"]


def test_a_semicolon_in_a_name_does_not_split_the_origin() -> None:
    proto = parser.parse_model(LINEAR)
    proto.graph.node[0].name = "a;b"
    node = import_model(proto).graph[0]
    assert (node.name, node.metadata_props[ORIGIN]) == ("a;b", "a,b")


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.0]}, np.array([1, 2], np.float32)),
        ({"value_int": 7}, np.int64(7)),
        ({"value_ints": [3, 4]}, np.array([3, 4], np.int64)),
        ({"value": numpy_helper.from_array(np.eye(2, dtype=np.float16))}, np.eye(2, dtype=np.float16)),
        ({"value_string": "s"}, np.array(b"s", object)),
    ],
)
def test_constants_are_lifted(attribute: dict[str, object], expected: np.ndarray) -> None:
    node = helper.make_node("Constant", [], ["c"], **attribute)
    use = helper.make_node("Shape", ["c"], ["y"])
    graph = helper.make_graph([node, use], "g", [], [helper.make_tensor_value_info("y", TensorProto.INT64, None)])
    model = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    assert [n.op_type for n in model.graph] == ["Shape"]
    tensor = model.graph.initializers["c"].const_value
    assert tensor is not None
    assert tensor.numpy().dtype == np.asarray(expected).dtype
    np.testing.assert_array_equal(tensor.numpy(), expected)


def test_foreign_functions_are_inlined_and_own_ones_kept() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "%s" : 1]>
        g (float[2] x) => (float[2] y) { h = %s.twice<f = 3.0>(x)  y = Relu(h) }
        <domain: "%s", opset_import: ["" : 17]> twice<f>(a) => (b)
        { k = Constant<value_float: float = @f>() t = Add(a, a) b = Mul(t, k) }"""
    model = import_model(parser.parse_model(text % (("lib",) * 3)))
    assert sorted(node.op_type for node in model.graph) == ["Add", "Mul", "Relu"]
    assert not model.functions
    assert "lib" not in model.opset_imports
    x = np.array([1, -1], np.float32)
    np.testing.assert_array_equal(run(to_bytes(model), {"x": x})[0], [6, 0])
    kept = import_model(parser.parse_model((text % (("qcompiler",) * 3)).replace('"" : 17', '"" : 21')))
    assert [node.op_type for node in kept.graph] == ["twice", "Relu"]


def test_a_function_of_an_older_opset_is_raised_before_inlining() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "lib" : 1]>
        g (float[2,3] x) => (float[2] y) { y = lib.total(x) }
        <domain: "lib", opset_import: ["" : 11]> total(a) => (b) { b = ReduceSum<axes = [1], keepdims = 0>(a) }"""
    model = import_model(parser.parse_model(text))
    np.testing.assert_array_equal(run(to_bytes(model), {"x": np.ones((2, 3), np.float32)})[0], [3, 3])


def test_an_unsorted_graph_is_sorted() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"""
    )
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert [node.op_type for node in import_model(proto).graph] == ["Relu", "Neg"]


def test_a_cycle_is_refused() -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { h = Add(x, y) y = Neg(h) }"""
    )
    with pytest.raises(ModelError, match="cycle"):
        import_model(proto)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_models_just_work(kind: str) -> None:
    model = import_model(
        parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 12]> g ({kind}[2,8] x) => ({kind}[2,8] y)
            {{ h = Relu(x)  y = Softmax<axis = 1>(h) }}"""
        )
    )
    assert [node.op_type for node in model.graph] == ["Relu", "Softmax"]
    assert {v.dtype for node in model.graph for v in node.outputs} == {ir.DataType[kind.upper()]}


def external_model(folder: Path, elements: int, *, write: bool = True) -> Path:
    """Write a model whose one weight [elements, 4] lies in a sparse file of zeros."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[elements, 4], data_location=TensorProto.EXTERNAL)
    size = elements * 16
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(size))):
        weight.external_data.add(key=key, value=value)
    rows = helper.make_tensor_value_info("i", TensorProto.INT64, ["N"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Gather", ["w", "i"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=1)]
    graph = helper.make_graph(nodes, "g", [rows], [out], [weight])
    path = folder / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]).SerializeToString())
    if write:
        with open(folder / "w.bin", "wb") as file:
            file.truncate(size)
    return path


def test_a_model_over_two_gigabytes_is_mapped_not_read(tmp_path: Path) -> None:
    model = import_model(external_model(tmp_path, 150_000_000))  # 2.4 GB, sparse on disk
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    assert weight.raw is None
    assert [node.op_type for node in model.graph] == ["Gather", "Softmax"]
    assert str(model.graph.outputs[0].shape) == "[N,4]"
    with pytest.raises(ModelError, match="do not fit into one protobuf"):
        to_bytes(model)


def test_missing_and_short_external_data(tmp_path: Path) -> None:
    path = external_model(tmp_path, 100, write=False)
    with pytest.raises(ModelError, match=r"external data of 'w' not found: .*w\.bin"):
        import_model(path)
    (tmp_path / "w.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError, match=r"truncated: .* has 100 bytes, expected 1600"):
        import_model(path)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path, 100)
    os.rename(tmp_path / "w.bin", tmp_path.parent / f"{tmp_path.name}.bin")
    (tmp_path / "w.bin").symlink_to(tmp_path.parent / f"{tmp_path.name}.bin")
    with pytest.raises(ModelError, match="external data of 'w' is refused"):
        import_model(path)


def test_small_external_tensors_are_read_for_shape_inference(tmp_path: Path) -> None:
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 21]> g (float[6] x) => (float[A,B] y) <int64[2] s = {2, 3}>
        { y = Reshape(x, s) }"""
    )
    onnx.save_model(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    model = import_model(tmp_path / "m.onnx")
    assert str(model.graph.outputs[0].shape) == "[2,3]"


def test_unreadable_files_give_one_clear_line(tmp_path: Path) -> None:
    good = parser.parse_model(LINEAR).SerializeToString()
    cases = {
        "empty": (b"", "is empty"),
        "truncated": (good[: len(good) // 2], "is truncated"),
        "text": (b"this is not a model at all", "not an ONNX model"),
        "no graph": (onnx.ModelProto(ir_version=8, producer_name="p").SerializeToString(), "no graph"),
    }
    for name, (data, reason) in cases.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(data)
        for source in (path, data):
            with pytest.raises(ModelError, match=reason) as caught:
                import_model(source)
            assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"cannot read .*nowhere"):
        import_model(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="cannot read"):
        import_model(tmp_path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[n] y = other.Foo(x)", "node 'n': unknown operator domain 'other' of Foo"),
        ("[n] y = Foo(x)", "node 'n': ONNX opset 21 has no operator Foo"),
        ("[n] y = qcompiler.Foo(x)", "node 'n': the model has no function qcompiler::Foo"),
        ("[n] y = Add(x, z)", "node 'n' .* reads 'z', which nothing produces"),
    ],
)
def test_unknown_operators_are_refused(body: str, reason: str) -> None:
    text = '<ir_version: 8, opset_import: ["" : 21, "other" : 1, "qcompiler" : 1]> g (float[2] x) => (float[2] y) {%s}'
    with pytest.raises(ModelError, match=reason):
        import_model(parser.parse_model(text % body))


def test_an_opset_newer_than_the_library_is_refused() -> None:
    proto = parser.parse_model(LINEAR)
    proto.opset_import[0].version = 999
    with pytest.raises(ModelError, match=r"ONNX opset 999.*install a newer onnx"):
        import_model(proto)


def test_microsoft_operators_pass() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }"""
    assert import_model(parser.parse_model(text)).graph[0].domain == "com.microsoft"


def test_shapes_are_fixed_wherever_the_axis_name_appears() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[N,T] x, float[N] z) => (float[N,T] y) { y = Relu(x) }"""
    model = import_model(parser.parse_model(text), shapes={"x": [3, -1]})
    assert [str(v.shape) for v in model.graph.inputs] == ["[3,T]", "[3]"]
    assert str(model.graph.outputs[0].shape) == "[3,T]"

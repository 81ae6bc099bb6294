"""The bridge to onnx-graphsurgeon: all of onnx's models there and back, and what the library's export gets wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

import qcompiler
from qcompiler.errors import ModelError
from qcompiler.ir.reader import read_model
from qcompiler.ir.serialize import to_bytes
from qcompiler.ir.text import print_model

gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed")

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"
KINDS = ("simple", "pytorch-operator", "pytorch-converted")
FLOAT = TensorProto.FLOAT


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = gs.logger.G_LOGGER
    before, logger.severity = logger.severity, gs.logger.G_LOGGER.CRITICAL
    yield
    logger.severity = before


def shipped() -> list[Path]:
    cases = [c for kind in KINDS for c in load_model_tests(kind=kind)]
    return sorted([*LIGHT.glob("*.onnx"), *(Path(c.model_dir) / "model.onnx" for c in cases)])


def there_and_back(model: Any) -> ir.Model:
    return qcompiler.from_graphsurgeon(qcompiler.to_graphsurgeon(model))


def model_of(nodes: list[Any], inputs: list[Any], outputs: list[Any], **more: Any) -> onnx.ModelProto:
    functions, opsets = more.pop("functions", []), more.pop("opsets", {"": 21})
    graph = helper.make_graph(nodes, "g", inputs, outputs, **more)
    imports = [helper.make_opsetid(*item) for item in opsets.items()]
    return helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)


def value(name: str, dtype: int = FLOAT, shape: Any = (2, 3)) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


# ---- there and back -------------------------------------------------------------------------------------------------


def test_every_shipped_model_comes_back_unchanged() -> None:
    paths = shipped()
    assert len(paths) >= 100
    changed = [str(p) for p in paths if print_model(there_and_back(p)) != print_model(read_model(p))]
    assert changed == []


def test_the_library_s_own_export_of_our_graph_is_the_same_model() -> None:
    for path in shipped()[::10]:
        exported = gs.export_onnx(qcompiler.to_graphsurgeon(path))
        assert print_model(read_model(exported)) == print_model(read_model(path))


def test_a_graph_that_the_library_imported_is_the_same_model() -> None:
    for path in shipped()[::10]:
        wanted = read_model(path)
        RemoveInitializersFromInputsPass()(wanted)  # what the library's import does: 61 of the models list them
        assert print_model(read_model(gs.import_onnx(onnx.load(path)))) == print_model(wanted)


def test_shapes_with_symbols_names_and_omitted_operands() -> None:
    nodes = [helper.make_node("Clip", ["x", "", "high"], ["y"], name="clip it", domain="")]
    high = numpy_helper.from_array(np.float32(1.0), "high")
    model = model_of(nodes, [value("x", shape=["batch", None, 3])], [value("y", shape=["batch", None, 3])],
                     initializer=[high])  # fmt: skip
    graph = qcompiler.to_graphsurgeon(model)
    assert graph.inputs[0].shape == ["batch", None, 3]
    assert [t.name for t in graph.nodes[0].inputs] == ["x", "", "high"]
    assert graph.nodes[0].name == "clip it"
    assert to_bytes(there_and_back(model)) == to_bytes(read_model(model))


def test_a_subgraph_captures_what_lies_outside() -> None:
    body = helper.make_graph([helper.make_node("Add", ["x", "w"], ["t"])], "then", [], [value("t")])
    other = helper.make_graph([helper.make_node("Mul", ["x", "k"], ["e"])], "else", [], [value("e")],
                              initializer=[numpy_helper.from_array(np.float32([2, 3, 4]), "k")])  # fmt: skip
    nodes = [
        helper.make_node("Neg", ["w"], ["n"]),
        helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=other),
    ]
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    model = model_of(nodes, [value("x"), value("c", TensorProto.BOOL, ())], [value("y"), value("n")],
                     initializer=[weight])  # fmt: skip
    graph = qcompiler.to_graphsurgeon(model)
    outer = graph.nodes[0].inputs[0]
    assert graph.nodes[1].attrs["then_branch"].nodes[0].inputs[1] is outer  # one object, as in the library's import
    back = qcompiler.from_graphsurgeon(graph)
    (then,) = [a.as_graph() for n in back.graph for k, a in n.attributes.items() if k == "then_branch"]
    assert not then.initializers  # the library's export repeats w in the branch
    assert then[0].inputs[1] is back.graph.initializers["w"]
    assert print_model(back) == print_model(read_model(model))


def test_functions_and_their_attributes() -> None:
    body = helper.make_node("LeakyRelu", ["a"], ["b"])
    body.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    function = helper.make_function("mine", "leak", ["a"], ["b"], [body], [helper.make_opsetid("", 21)], ["slope"])
    model = model_of([helper.make_node("leak", ["x"], ["y"], domain="mine", slope=0.25)], [value("x")], [value("y")],
                     functions=[function], opsets={"": 21, "mine": 1})  # fmt: skip
    graph = qcompiler.to_graphsurgeon(model)
    assert graph.functions[0].attrs == {"slope": None}
    assert to_bytes(there_and_back(model)) == to_bytes(read_model(model))


@pytest.mark.parametrize(
    "name", ["BFLOAT16", "FLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "INT4", "UINT4",
             "FLOAT4E2M1"]
)  # fmt: skip
def test_a_constant_of_every_small_type_keeps_its_bits_loaded_or_not(name: str) -> None:
    dtype = ir.DataType[name]
    rng = np.random.default_rng(3)
    array = rng.integers(0, 7, (3, 5)).astype(dtype.numpy())
    weight = ir.serde.serialize_tensor(ir.Tensor(array, dtype=dtype, name="w"))
    model = model_of([helper.make_node("Identity", ["w"], ["y"])], [], [value("y", int(dtype), (3, 5))],
                     initializer=[weight], opsets={"": 23})  # fmt: skip
    graph = qcompiler.to_graphsurgeon(model)
    assert to_bytes(qcompiler.from_graphsurgeon(graph)) == to_bytes(read_model(model))
    constant = graph.nodes[0].inputs[0]
    assert np.array_equal(constant.values.astype(np.float32), array.astype(np.float32))  # loads it
    back = qcompiler.from_graphsurgeon(graph).graph.initializers["w"].const_value
    assert back is not None
    assert (back.dtype, back.tobytes()) == (dtype, ir.Tensor(array, dtype=dtype).tobytes())


def test_weights_in_a_file_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x", shape=(4, 64))],
                     [value("y", shape=(4, 64))], initializer=[numpy_helper.from_array(weight, "w")])  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    graph = qcompiler.to_graphsurgeon(path)
    constant = graph.nodes[0].inputs[1]
    assert isinstance(constant._values, gs.ir.tensor.LazyValues)
    assert (constant.shape, constant.dtype) == ([64, 64], np.float32)
    kept = qcompiler.from_graphsurgeon(graph).graph.initializers["w"].const_value
    assert isinstance(kept, ir.ExternalTensor)
    (exported,) = gs.export_onnx(graph).graph.initializer
    assert exported.data_location == TensorProto.DEFAULT
    assert np.array_equal(numpy_helper.to_array(exported), weight)
    assert np.array_equal(constant.values, weight)


# ---- graphs made by hand --------------------------------------------------------------------------------------------


def hand_made(*nodes: Any, inputs: list[Any], outputs: list[Any], opset: int = 21) -> Any:
    return gs.Graph(nodes=list(nodes), inputs=inputs, outputs=outputs, opset=opset)


def variable(name: str, shape: Any = (2, 3), dtype: Any = np.float32) -> Any:
    return gs.Variable(name, dtype, shape)


def test_nodes_in_any_order_are_sorted_and_a_cycle_is_named() -> None:
    x, t, y = variable("x"), variable("t"), variable("y")
    graph = hand_made(gs.Node("Neg", "b", inputs=[t], outputs=[y]), gs.Node("Abs", "a", inputs=[x], outputs=[t]),
                      inputs=[x], outputs=[y])  # fmt: skip
    assert [n.op_type for n in qcompiler.from_graphsurgeon(graph).graph] == ["Abs", "Neg"]
    assert [n.op for n in graph.nodes] == ["Neg", "Abs"]  # the given graph is as it was
    graph.nodes[1].inputs = [y]
    with pytest.raises(ModelError, match="has a cycle"):
        qcompiler.from_graphsurgeon(graph)


def test_values_of_attributes_become_what_the_operator_wants() -> None:
    x, y, z = variable("x"), variable("y"), variable("z", None, np.int64)
    graph = hand_made(
        gs.Node("LeakyRelu", attrs={"alpha": 1}, inputs=[x], outputs=[y]),
        gs.Node("Cast", attrs={"to": np.int64}, inputs=[y], outputs=[z]),
        inputs=[x], outputs=[z],
    )  # fmt: skip
    first, second = qcompiler.from_graphsurgeon(graph).graph
    alpha, to = first.attributes["alpha"], second.attributes["to"]
    assert (alpha.type, alpha.value) == (ir.AttributeType.FLOAT, 1.0)
    assert (to.type, to.value) == (ir.AttributeType.INT, int(ir.DataType.INT64))


def test_an_empty_list_has_the_operator_s_type() -> None:
    out = variable("y", [0])
    node = gs.Node("Constant", attrs={"value_floats": []}, outputs=[out])
    (made,) = qcompiler.from_graphsurgeon(hand_made(node, inputs=[], outputs=[out])).graph
    assert made.attributes["value_floats"].type == ir.AttributeType.FLOATS


def test_a_length_of_minus_one_is_an_open_axis() -> None:
    x, y = variable("x", [-1, 3]), variable("y", [-1, 3])
    made = qcompiler.from_graphsurgeon(hand_made(gs.Node("Neg", inputs=[x], outputs=[y]), inputs=[x], outputs=[y]))
    assert made.graph.inputs[0].shape == ir.Shape([None, 3])


def test_an_export_type_saturates_and_texts_stay_texts() -> None:
    weight = gs.Constant("w", np.float32([1.0, 1000.0, -1e9]))
    weight._export_dtype = TensorProto.FLOAT8E4M3FN  # its setter refuses with this release of onnx
    words = gs.Constant("t", np.array(["ü", "b"], dtype=object))
    a, b = variable("a", [3], TensorProto.FLOAT8E4M3FN), variable("b", [2], np.object_)
    nodes = [gs.Node("Identity", inputs=[given], outputs=[out]) for given, out in ((weight, a), (words, b))]
    graph = hand_made(*nodes, inputs=[], outputs=[a, b])
    made = qcompiler.from_graphsurgeon(graph).graph.initializers
    tensor, text = made["w"].const_value, made["t"].const_value
    assert tensor is not None
    assert text is not None
    assert tensor.dtype == ir.DataType.FLOAT8E4M3FN
    assert tensor.numpy().astype(np.float32).tolist() == [1.0, 448.0, -448.0]
    assert text.numpy().tolist() == ["ü".encode(), b"b"]


def test_a_constant_in_a_function_is_a_node_there() -> None:
    a, b = gs.Variable("a"), gs.Variable("b")
    two = gs.Constant("two", np.float32([2]))
    twice = gs.Function("twice", domain="mine", nodes=[gs.Node("Mul", inputs=[a, two], outputs=[b])], inputs=[a],
                        outputs=[b], opset=21)  # fmt: skip
    x, y = variable("x"), variable("y")
    graph = gs.Graph([gs.Node("twice", inputs=[x], outputs=[y], domain="mine")], [x], [y], opset=21, functions=[twice])
    made = qcompiler.from_graphsurgeon(graph)
    (function,) = made.functions.values()
    assert [n.op_type for n in function] == ["Constant", "Mul"]
    assert made.opset_imports == {"": 21, "mine": 1}
    onnx.checker.check_model(to_bytes(made))


def add_constants(*names: str) -> Any:
    """Return a graph of y = (x + 1) * 2 whose two constants, different objects, have the given names."""
    x, t, y = variable("x"), variable("t"), variable("y")
    one, two = (gs.Constant(n, np.full((1,), k, np.float32)) for n, k in zip(names, (1, 2), strict=True))
    return hand_made(gs.Node("Add", "a", inputs=[x, one], outputs=[t]),
                     gs.Node("Mul", "m", inputs=[t, two], outputs=[y]), inputs=[x], outputs=[y])  # fmt: skip


def computed(graph: Any, **feeds: Any) -> list[Any]:
    return ReferenceEvaluator(onnx.load_model_from_string(to_bytes(qcompiler.from_graphsurgeon(graph)))).run(
        None, feeds or {"x": np.zeros((2, 3), np.float32)}
    )


@pytest.mark.parametrize(
    ("names", "wanted"), [(("k", "k"), ["k", "k_1"]), (("", ""), ["tensor_1", "tensor_2"]), (("t", "k"), ["t_1", "k"])]
)
def test_constants_are_told_apart_as_objects(names: tuple[str, str], wanted: list[str]) -> None:
    graph = add_constants(*names)
    model = qcompiler.from_graphsurgeon(graph)
    assert list(model.graph.initializers) == wanted
    assert [[v.name for v in n.outputs] for n in model.graph] == [["t"], ["y"]]
    assert computed(graph)[0].tolist() == [[2.0] * 3] * 2
    assert [t.name for n in graph.nodes for t in n.inputs[1:]] == list(names)  # the given graph is as it was


def test_results_of_one_name_or_none_are_told_apart_and_inputs_and_outputs_keep_theirs() -> None:
    x, y = variable("x"), variable("y")
    first, second, unnamed, like_output = variable("x"), variable("x"), variable(""), variable("y")
    high = gs.Constant("", np.array(3, np.float32))
    graph = hand_made(
        gs.Node("Neg", inputs=[x], outputs=[first]),
        gs.Node("Exp", inputs=[x], outputs=[second]),
        gs.Node("Sub", inputs=[second, first], outputs=[unnamed]),
        gs.Node("Clip", inputs=[unnamed, gs.Variable.empty(), high], outputs=[like_output]),
        gs.Node("Add", inputs=[like_output, x], outputs=[y]),
        inputs=[x], outputs=[y],
    )  # fmt: skip
    model = qcompiler.from_graphsurgeon(graph)
    assert [v.name for v in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]
    names = [v.name for n in model.graph for v in n.outputs]
    assert names == ["x_1", "x_2", "tensor_1", "y_1", "y"]
    x0 = np.array([[0.0, 1.0, 2.0], [-1.0, -2.0, 0.5]], np.float32)
    np.testing.assert_allclose(computed(graph, x=x0)[0], np.minimum(np.exp(x0) + x0, 3) + x0, rtol=1e-6)


def test_what_is_left_out_stays_so_also_where_one_object_says_it() -> None:
    x, a, b, y, nothing = variable("x"), variable("a"), variable("b"), variable("y"), gs.Variable.empty()
    graph = hand_made(
        gs.Node("Dropout", inputs=[x], outputs=[a, nothing]),
        gs.Node("Dropout", inputs=[a], outputs=[b, nothing]),
        gs.Node("Clip", inputs=[b, nothing, gs.Constant("high", np.array(3, np.float32))], outputs=[y]),
        inputs=[x], outputs=[y],
    )  # fmt: skip
    first, _, clip = qcompiler.from_graphsurgeon(graph).graph
    assert [v.name for v in first.outputs] == ["a", ""]
    assert clip.inputs[1] is None


def test_a_body_s_constant_of_an_outer_name_is_its_own_and_a_variable_of_one_is_the_outer_s() -> None:
    x, c, y = variable("x"), variable("c", (), np.bool_), variable("y")
    outer, inner = (gs.Constant("k", np.full((1,), k, np.float32)) for k in (1, 10))
    bodies = {}
    for name in ("then_branch", "else_branch"):
        t, out = variable("t"), variable(f"{name}/y")
        nodes = [gs.Node("Add", inputs=[gs.Variable("x"), outer], outputs=[t]),
                 gs.Node("Mul", inputs=[t, inner], outputs=[out])]  # fmt: skip
        bodies[name] = gs.Graph(nodes, [], [out], opset=21)
    h = variable("h")
    graph = hand_made(gs.Node("If", attrs=bodies, inputs=[c], outputs=[h]),
                      gs.Node("Add", inputs=[h, outer], outputs=[y]), inputs=[x, c], outputs=[y])  # fmt: skip
    assert computed(graph, x=np.zeros((2, 3), np.float32), c=np.array(True))[0].tolist() == [[11.0] * 3] * 2


def test_inputs_outputs_and_results_have_names_of_their_own() -> None:
    x, y = variable("x"), variable("y")
    node = gs.Node("Neg", "n", inputs=[x], outputs=[y])
    for inputs, outputs, text in (
        ([x, variable("x")], [y], "2 inputs of the graph .* are named 'x'"),
        ([x], [y, variable("y")], "2 outputs of the graph .* are named 'y'"),
        ([x], [y, y], "2 outputs of the graph .* are named 'y'"),
        ([x, variable("")], [y], "one of the inputs of the graph .* has no name"),
        ([x, variable("y")], [y], "an input and another output of the graph .* are named 'y'"),
        ([x, y], [y], r"tensor 'y' is made by node 'n' \(Neg\), and elsewhere"),
    ):
        with pytest.raises(ModelError, match=text):
            qcompiler.from_graphsurgeon(hand_made(node, inputs=inputs, outputs=outputs))
    first, second, z = variable("t"), variable("t"), variable("z")
    nodes = [gs.Node(op, inputs=[x], outputs=[t]) for op, t in (("Neg", first), ("Exp", second))]
    reader = gs.Node("Add", inputs=[variable("t"), first], outputs=[z])
    with pytest.raises(ModelError, match="2 tensors are named 't', and nothing tells which is read"):
        qcompiler.from_graphsurgeon(hand_made(*nodes, reader, inputs=[x], outputs=[z]))


def test_another_object_of_a_result_s_name_stands_for_it() -> None:
    x, t = variable("x"), variable("t")
    graph = hand_made(gs.Node("Neg", inputs=[x], outputs=[t]),
                      gs.Node("Neg", inputs=[variable("t")], outputs=[variable("y")]),
                      inputs=[x], outputs=[variable("y")])  # fmt: skip
    model = qcompiler.from_graphsurgeon(graph)
    assert [[v.name for v in (*n.inputs, *n.outputs)] for n in model.graph] == [["x", "t"], ["t", "y"]]
    assert model.graph.outputs[0].producer() is model.graph[1]


def test_bytes_that_are_no_text_are_named() -> None:
    x, y = variable("x"), variable("y")
    graph = hand_made(gs.Node("Foo", attrs={"blob": b"\xff\x00"}, inputs=[x], outputs=[y], domain="mine"),
                      inputs=[x], outputs=[y])  # fmt: skip
    with pytest.raises(ModelError, match=r"attribute 'blob' is b'\\xff\\x00', which is no UTF-8 text"):
        qcompiler.from_graphsurgeon(graph)
    graph.nodes[0].attrs["blob"] = "ü".encode()
    assert next(iter(qcompiler.from_graphsurgeon(graph).graph)).attributes["blob"].value == "ü"


def test_what_cannot_be_held_is_named() -> None:
    sequence = helper.make_sequence_type_proto(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None)))
    nested = model_of([helper.make_node("Identity", ["x"], ["y"])], [helper.make_value_info("x", sequence)],
                      [helper.make_value_info("y", sequence)])  # fmt: skip
    with pytest.raises(ModelError, match=r"value 'x' is a Sequence.* cannot hold"):
        qcompiler.to_graphsurgeon(nested)
    x, y = gs.Variable("x", onnx.TypeProto(), None, "map_type"), variable("y")
    graph = hand_made(gs.Node("Identity", inputs=[x], outputs=[y]), inputs=[x], outputs=[y])
    with pytest.raises(ModelError, match="tensor 'x' is a map_type, of which onnx-graphsurgeon keeps a part only"):
        qcompiler.from_graphsurgeon(graph)


def test_weights_are_shared_and_everything_else_is_not() -> None:
    graph = add_constants("one", "two")
    model = qcompiler.from_graphsurgeon(graph)
    one, two = (n.inputs[1] for n in graph.nodes)
    one.values[:] = 5
    two.values = np.full((1,), 7, np.float32)
    graph.nodes[0].inputs.clear()
    graph.inputs[0].name = "other"
    held = [v.const_value.numpy().tolist() for v in model.graph.initializers.values() if v.const_value is not None]
    assert held == [[5.0], [2.0]]
    assert [[v.name for v in n.inputs if v is not None] for n in model.graph] == [["x", "one"], ["t", "two"]]


# ---- compile --------------------------------------------------------------------------------------------------------


def test_compile_takes_a_graph_and_gives_the_bytes_of_the_file() -> None:
    rng = np.random.default_rng(5)
    weight = numpy_helper.from_array(rng.standard_normal((256, 256)).astype(np.float32), "w")
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], [value("x", shape=("n", 256))],
                     [value("y", shape=("n", 256))], initializer=[weight])  # fmt: skip
    feeds = [{"x": rng.standard_normal((4, 256)).astype(np.float32)} for _ in range(10)]
    graph = gs.import_onnx(model)
    made = qcompiler.compile(graph, recipe="int8-static", calibration=feeds, guard=False)
    assert made.to_bytes() == qcompiler.compile(model, recipe="int8-static", calibration=feeds, guard=False).to_bytes()
    assert made.decisions.forms == {"mm": "static-float"}
    # Metadata (origins) has no place in such a graph; all else has.
    assert to_bytes(there_and_back(made.model), strip=True) == made.to_bytes()


def test_something_else_is_refused_by_its_type() -> None:
    with pytest.raises(ModelError, match=r"cannot read a model from a builtins\.int: expected a path"):
        qcompiler.compile(3)  # type: ignore[arg-type]

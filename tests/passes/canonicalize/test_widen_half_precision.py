"""widen-half-precision and store-half-precision: what is widened, what keeps its type, what a file holds."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import Array, EngineOptions
from qcompiler.ir.graph import all_graphs, all_nodes
from qcompiler.ir.importer import import_model
from qcompiler.ir.phase import Phase
from qcompiler.ir.text import print_model
from qcompiler.ir.verify import verify
from qcompiler.passes.front import front_passes
from qcompiler.passes.store_half_precision import StoreHalfPrecision
from qcompiler.passes.widen_half_precision import WidenHalfPrecision
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.targets.target import load_target

HALF, FLOAT, BRAIN = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16
PLAIN = EngineOptions(threads=1, optimize=False)
DRAW = np.random.default_rng(11)


def tensor(name: str, array: Array) -> TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())


def half(*shape: int) -> Array:
    return DRAW.normal(0, 0.5, shape).astype(np.float16)


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto],
    weights: dict[str, Array] | None = None, opset: int = 21,
) -> onnx.ModelProto:  # fmt: skip
    constants = [tensor(name, array) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def widen(proto: onnx.ModelProto) -> tuple[CompileState, int]:
    state = CompileState(import_model(proto), load_target("ort-x86"))
    changes = WidenHalfPrecision().run(state)
    verify(state.model, Phase.FLOAT)
    return state, changes


def types(graph: ir.Model) -> set[str]:
    return {v.dtype.name for n in all_nodes(graph) for v in n.outputs if v.dtype is not None}


def agrees(proto: onnx.ModelProto, state: CompileState, feed: dict[str, Array], rel: float = 2e-2) -> None:
    """Both run, give the same types, and differ by no more than the rounding of the half type."""
    before = OrtEngine().load(import_model(proto), PLAIN).run(feed)
    after = OrtEngine().load(state.model, PLAIN).run(feed)
    assert list(before) == list(after)
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        wide, now = array.astype(np.float64), after[name].astype(np.float64)
        assert np.max(np.abs(wide - now), initial=0.0) <= rel * max(1e-3, np.max(np.abs(wide), initial=0.0))


def mlp(kind: int = HALF) -> onnx.ModelProto:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="up"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="down"),
    ]
    weights = {"w": half(32, 64), "v": half(64, 16)}
    if kind == BRAIN:
        weights = {n: a.astype(ml_dtypes.bfloat16) for n, a in weights.items()}
    return model(nodes, [value("x", kind, "n", 32)], [value("y", kind, "n", 16)], weights)


def test_float32_is_left_alone() -> None:
    proto = model(
        [helper.make_node("Relu", ["x"], ["y"])], [value("x", FLOAT, 2, 3)], [value("y", FLOAT, 2, 3)],
    )  # fmt: skip
    state, changes = widen(proto)
    assert changes == 0
    assert state.half is None


def test_products_widen_between_casts_at_the_borders() -> None:
    proto = mlp()
    state, changes = widen(proto)
    assert changes > 0
    assert [n.op_type for n in state.model.graph] == ["Cast", "MatMul", "Relu", "MatMul", "Cast"]
    assert [v.dtype for v in (*state.model.graph.inputs, *state.model.graph.outputs)] == [ir.DataType.FLOAT16] * 2
    assert [str(v.name) for v in state.model.graph.outputs] == ["y"]
    weights = state.model.graph.initializers
    assert weights["w"].dtype is ir.DataType.FLOAT
    np.testing.assert_array_equal(
        weights["w"].const_value.numpy(), numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float32)
    )
    agrees(proto, state, {"x": half(5, 32)})


def test_a_second_run_changes_nothing() -> None:
    state, _ = widen(mlp())
    text = print_model(state.model)
    assert WidenHalfPrecision().run(state) == 0
    assert print_model(state.model) == text
    assert state.half is ir.DataType.FLOAT16


def test_rounding_on_purpose_stays() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=HALF),
        helper.make_node("Cast", ["h"], ["w"], to=FLOAT),
        helper.make_node("IsInf", ["w"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=FLOAT),
    ]
    proto = model(nodes, [value("x", FLOAT, 4)], [value("y", FLOAT, 4)])
    state, changes = widen(proto)
    assert changes == 0
    feed = {"x": np.array([1.0, 1e6, -1e6, 6e4], np.float32)}
    np.testing.assert_array_equal(OrtEngine().load(state.model, PLAIN).run(feed)["y"], [0.0, 1.0, 1.0, 0.0])


def test_weights_that_are_only_stored_narrow_are_stored_so_again() -> None:
    nodes = [helper.make_node("Cast", ["w"], ["wf"], to=FLOAT), helper.make_node("MatMul", ["x", "wf"], ["y"])]
    proto = model(nodes, [value("x", FLOAT, 2, 64)], [value("y", FLOAT, 2, 64)], {"w": half(64, 64)})
    state, changes = widen(proto)
    assert changes == 0
    Pipeline(front_passes()).run(state)
    assert {v.dtype for v in state.model.graph.initializers.values()} == {ir.DataType.FLOAT}
    state.phase = Phase.LOWERED
    assert StoreHalfPrecision().run(state) == 1
    agrees(proto, state, {"x": half(2, 64).astype(np.float32)}, rel=1e-6)


@pytest.mark.parametrize("nodes", [0, 1])
def test_an_output_that_is_a_constant_keeps_its_type(nodes: int) -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])][:nodes]
    outputs = [value("w", HALF, 2), *([value("y", HALF, 4)] if nodes else [])]
    proto = model(body, [value("x", HALF, 4)], outputs, {"w": half(2)})
    state, changes = widen(proto)
    assert (changes > 0) == bool(nodes)
    assert [(str(v.name), v.dtype) for v in state.model.graph.outputs] == [
        (o.name, ir.DataType.FLOAT16) for o in outputs
    ]
    if nodes:
        agrees(proto, state, {"x": half(4)})


def test_an_output_that_is_listed_twice_keeps_its_name() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["y"])], [value("x", HALF, 4)], [value("y", HALF, 4)] * 2)
    state, _ = widen(proto)
    assert [(str(v.name), v.dtype) for v in state.model.graph.outputs] == [("y", ir.DataType.FLOAT16)] * 2
    agrees(proto, state, {"x": half(4)})


def test_the_precision_of_a_quantizer_widens() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], precision=HALF),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], output_dtype=HALF),
    ]
    weights: dict[str, Array] = {"s": np.array(0.1, np.float16), "z": np.array(3, np.uint8)}
    state, _ = widen(model(nodes, [value("x", HALF, 4)], [value("y", HALF, 4)], weights, opset=23))
    found = {n.op_type: n.attributes for n in state.model.graph}
    assert found["QuantizeLinear"]["precision"].as_int() == FLOAT
    assert found["DequantizeLinear"]["output_dtype"].as_int() == FLOAT


def test_attributes_that_name_the_type() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node(
            "ConstantOfShape", ["s"], ["c"], value=tensor("v", np.array([1.5], np.float16)),
        ),
        helper.make_node("Cast", ["i"], ["f"], to=HALF),
        helper.make_node("Add", ["c", "f"], ["a"]),
        helper.make_node("Mul", ["a", "x"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, [value("x", HALF, 2, 3), value("i", TensorProto.INT64, 2, 3)], [value("y", HALF, 2, 3)])
    state, _ = widen(proto)
    made = {n.op_type: n for n in state.model.graph}
    assert made["ConstantOfShape"].attributes["value"].as_tensor().dtype is ir.DataType.FLOAT
    inner = next(n for n in state.model.graph if n.op_type == "Cast" and n.inputs[0].name == "i")
    assert inner.attributes["to"].as_int() == FLOAT
    agrees(proto, state, {"x": half(2, 3), "i": np.arange(6, dtype=np.int64).reshape(2, 3)})


def test_quantized_models_get_float32_scales() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "s": np.array(0.0625, np.float16), "z": np.array(128, np.uint8), "w": half(8, 4),
    }  # fmt: skip
    proto = model(nodes, [value("x", HALF, 3, 8)], [value("y", HALF, 3, 4)], weights)
    state, _ = widen(proto)
    assert types(state.model) == {"FLOAT", "UINT8", "FLOAT16"}
    agrees(proto, state, {"x": half(3, 8)})


def test_branches_and_what_they_capture() -> None:
    then = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["t"])], "then", [], [value("t", HALF, 3, 3)])
    other = helper.make_graph(
        [helper.make_node("Add", ["x", "b"], ["o"])], "else", [], [value("o", HALF, 3, 3)],
        [tensor("b", half(3))],
    )  # fmt: skip
    nodes = [
        helper.make_node("If", ["c"], ["r"], then_branch=then, else_branch=other),
        helper.make_node("Neg", ["r"], ["y"]),
    ]
    proto = model(
        nodes, [value("c", TensorProto.BOOL), value("x", HALF, 3, 3)], [value("y", HALF, 3, 3)], {"w": half(3, 3)}
    )
    state, _ = widen(proto)
    for graph in list(all_graphs(state.model))[1:]:
        assert {v.dtype for n in graph for v in n.outputs} == {ir.DataType.FLOAT}
        assert {v.dtype for v in graph.initializers.values()} <= {ir.DataType.FLOAT}
    for condition in (True, False):
        agrees(proto, state, {"c": np.array(condition), "x": half(3, 3)})


def test_loop_states_widen() -> None:
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["v", "k"], ["next"]),
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Identity", ["next"], ["each"]),
        ],
        "body",
        [value("i", TensorProto.INT64), value("go", TensorProto.BOOL), value("v", HALF, 4)],
        [value("on", TensorProto.BOOL), value("next", HALF, 4), value("each", HALF, 4)],
        [tensor("k", np.array(1.25, np.float16))],
    )
    nodes = [helper.make_node("Loop", ["n", "", "x"], ["last", "all"], body=body)]
    weights: dict[str, Array] = {"n": np.array(3, np.int64)}
    proto = model(nodes, [value("x", HALF, 4)], [value("last", HALF, 4), value("all", HALF, 3, 4)], weights)
    state, _ = widen(proto)
    agrees(proto, state, {"x": half(4)})
    inner = list(all_graphs(state.model))[1]
    assert [v.dtype.name for v in inner.inputs if v.dtype is not None] == ["INT64", "BOOL", "FLOAT"]


def test_bits_are_read_as_they_were() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["m"]),
        helper.make_node("BitCast", ["m"], ["b"], to=TensorProto.UINT16),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.INT64),
    ]
    proto = model(nodes, [value("x", HALF, 4)], [value("y", TensorProto.INT64, 4)], opset=26)
    state, _ = widen(proto)
    (reader,) = (n for n in state.model.graph if n.op_type == "BitCast")
    assert reader.inputs[0] is not None
    assert reader.inputs[0].dtype is ir.DataType.FLOAT16
    (product,) = (n for n in state.model.graph if n.op_type == "Mul")
    assert product.outputs[0].dtype is ir.DataType.FLOAT


def test_odd_outputs_keep_name_and_type() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    proto = model(
        nodes, [value("x", HALF, 4)], [value("y", HALF, 4), value("x", HALF, 4), value("w", HALF, 2)], {"w": half(2)}
    )
    state, _ = widen(proto)
    assert state.model.graph.outputs[0].name == "y"
    assert {v.dtype for v in state.model.graph.outputs} == {ir.DataType.FLOAT16}
    agrees(proto, state, {"x": half(4)})


def test_sequences_hold_it_back() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"]),
        helper.make_node("ConcatFromSequence", ["s"], ["y"], axis=0),
    ]
    state, changes = widen(model(nodes, [value("x", HALF, 4)], [value("y", HALF, 8)]))
    assert changes == 0
    assert [r.reason for r in state.remarks] == ["not-a-tensor"]


@pytest.mark.parametrize("kind", [HALF, BRAIN])
def test_constants_are_stored_as_they_came(kind: int) -> None:
    state, _ = widen(mlp(kind))
    state.phase = Phase.LOWERED
    numbers = state.model.graph.initializers["w"].const_value.numpy()
    assert StoreHalfPrecision().run(state) == 2
    stored = {str(v.name): v for v in state.model.graph.initializers.values()}
    assert {v.dtype for v in stored.values()} == {ir.DataType.FLOAT16 if kind == HALF else ir.DataType.BFLOAT16}
    kept = next(v for v in stored.values() if v.shape == ir.Shape([32, 64])).const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy().astype(np.float32), numbers)
    assert StoreHalfPrecision().run(state) == 0


def test_constants_that_were_changed_stay_wide() -> None:
    state, _ = widen(mlp())
    state.phase = Phase.LOWERED
    weight = state.model.graph.initializers["w"]
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float32(1.0001), name="w")
    assert StoreHalfPrecision().run(state) == 1
    assert state.model.graph.initializers["w"].dtype is ir.DataType.FLOAT


def test_float32_models_are_stored_as_they_are() -> None:
    weights: dict[str, Array] = {"w": half(64, 64).astype(np.float32)}
    proto = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], [value("x", FLOAT, 2, 64)], [value("y", FLOAT, 2, 64)], weights
    )
    state, _ = widen(proto)
    state.phase = Phase.LOWERED
    assert StoreHalfPrecision().run(state) == 0

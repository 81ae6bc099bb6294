"""Lowering the operator set: what stands in the way, what is written in an older form, the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.backends.onnxruntime import OrtEngine
from qcompiler.engine import EngineOptions
from qcompiler.errors import ModelError
from qcompiler.ir.opset import min_opset, set_opset
from qcompiler.ir.serialize import to_bytes

F = TensorProto.FLOAT


B = TensorProto.BOOL


def graph(
    nodes: list[onnx.NodeProto], shape: list[Any], weights: dict[str, Any] | None = None, rank: int = 2, kind: int = F
) -> ir.Model:
    """Return a model of x to y of a rank, both of one type, in opset 21, without any types inside."""
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in (weights or {}).items()]
    made = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, [f"y{i}" for i in range(rank)])], constants,
    )  # fmt: skip
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(proto)


def lowered(model: ir.Model, version: int) -> ir.Model:
    """Lower a clone, and hold that it is valid, loads, and computes the same."""
    made = model.clone()
    set_opset(made, version)
    assert made.opset_imports[""] == version
    onnx.checker.check_model(onnx.load_from_string(to_bytes(made)), full_check=True)
    dtype = made.graph.inputs[0].dtype
    assert dtype is not None
    x = np.random.default_rng(0).normal(0, 3, (4, 6)).astype(dtype.numpy())
    plain = EngineOptions(threads=1, optimize=False)
    before, after = (OrtEngine().load(m, plain).run({"x": x}) for m in (model, made))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    return made


def test_unknown_types_are_inferred_before_they_hold_a_node() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Add", ["d", "d"], ["a"]),
        helper.make_node("Flatten", ["a"], ["y"]),
    ]
    model = graph(nodes, ["n", 6], {"s": np.float32(0.05), "z": np.uint8(100)})
    assert min_opset(model.clone()) == 13
    lowered(model, 13)


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax", "ReduceL2", "ReduceSumSquare"])
def test_reductions_get_their_axes_back_as_an_attribute(operator: str) -> None:
    node = helper.make_node(operator, ["x", "axes"], ["y"], keepdims=0)
    made = lowered(graph([node], [4, 6], {"axes": np.array([-1])}, 1), 17)
    (reduction,) = made.graph
    assert len(reduction.inputs) == 1
    assert tuple(reduction.attributes["axes"].as_ints()) == (-1,)
    assert not made.graph.initializers


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "INT32", "INT64", "INT8", "UINT8"])
@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin"])
def test_reductions_of_every_type_that_the_older_form_takes_are_lowered(operator: str, kind: str) -> None:
    node = helper.make_node(operator, ["x", "axes"], ["y"], keepdims=0)
    model = graph([node], [4, 6], {"axes": np.array([0])}, 1, TensorProto.DataType.Value(kind))
    (reduction,) = lowered(model, 13).graph
    assert tuple(reduction.attributes["axes"].as_ints()) == (0,)


@pytest.mark.parametrize("operator", ["ReduceMax", "ReduceMin"])
def test_a_type_that_the_older_form_does_not_take_holds_a_reduction(operator: str) -> None:
    node = helper.make_node(operator, ["x", "axes"], ["y"], keepdims=0, name="any")
    model = graph([node], [4, 6], {"axes": np.array([1])}, 1, B)
    before = to_bytes(model)
    assert min_opset(model.clone()) == 20
    for version in (13, 17, 18, 19):
        with pytest.raises(ModelError, match=rf"to opset {version}: {operator} 'any' needs at least 20$"):
            set_opset(model, version)
    assert to_bytes(model) == before
    lowered(model, 20)


def test_reductions_over_everything() -> None:
    made = lowered(graph([helper.make_node("ReduceMean", ["x"], ["y"])], [4, 6]), 13)
    assert "axes" not in next(iter(made.graph)).attributes


def test_axes_that_are_computed_hold_a_reduction() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"], start=0, end=1),
        helper.make_node("Sub", ["s", "four"], ["axes"]),
        helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
    ]
    with pytest.raises(ModelError, match=r"ReduceMean .* needs at least 18"):
        set_opset(graph(nodes, [4, 6], {"four": np.array([4])}), 17)


def test_equal_parts_need_no_count() -> None:
    nodes = [
        helper.make_node("Split", ["x"], ["a", "b", "c"], axis=-1, num_outputs=3),
        helper.make_node("Sum", ["a", "b", "c"], ["y"]),
    ]
    lowered(graph(nodes, [4, 6]), 17)
    with pytest.raises(ModelError, match="Split"):
        set_opset(graph([helper.make_node("Split", ["x"], ["y", "b"], num_outputs=2)], [5, 6]), 17)
    with pytest.raises(ModelError, match="Split"):
        set_opset(graph([helper.make_node("Split", ["x"], ["y", "b"], num_outputs=2)], ["n", 6]), 17)


def test_what_cannot_be_lowered_is_named() -> None:
    node = helper.make_node("Gelu", ["x"], ["y"], name="act")
    with pytest.raises(ModelError, match="Gelu 'act' needs at least 20"):
        set_opset(graph([node], [4, 6]), 17)

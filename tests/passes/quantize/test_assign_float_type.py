"""Strongly typed regions: what becomes float16, what stays float32 and why, and where the Casts stand."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from qcompiler.calibration.observe import observe
from qcompiler.engine import Array
from qcompiler.errors import PassError
from qcompiler.ir.graph import all_graphs, const_array
from qcompiler.ir.phase import Phase
from qcompiler.ir.verify import verify
from qcompiler.passes.assign_float_type import AssignFloatType
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_tensorrt import LowerTensorrt
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.pipeline.pipeline import Pipeline
from qcompiler.pipeline.state import CompileState
from qcompiler.search.quality import sqnr_db
from qcompiler.targets.target import load_target
from tests.passes.quantize.lab import ENGINE, REFERENCE, import_exactly, lab, model_of, normal, ops, reasons

F = np.float32
TARGET = load_target("tensorrt-sm80")
HALF_DB = 20 * math.log10(2**11)
"""SQNR of one rounding to float16, 66 dB; products of a few roundings lie some dB below."""
W = {"w": normal(1, 16, 16, scale=0.2), "v": normal(2, 16, 16, scale=0.2), "c": normal(3, 16)}


def narrow(
    body: str, inputs: str = "float[4,16] x", weights: dict[str, Array] | None = None, type_: str = "float16",
    outputs: str = "float[] y", observed: tuple[str, ...] = (), scale: float = 1.0,
) -> tuple[CompileState, ir.Model, list[Array], list[Array]]:  # fmt: skip
    """Assign the type, verify, and return the state, the model of before, and the outputs of before and after."""
    proto = model_of(inputs, outputs, body, W if weights is None else weights)
    state = CompileState(import_exactly(proto), TARGET, phase=Phase.LOWERED)
    before = state.model.clone()
    rng = np.random.default_rng(0)
    feed = {str(v.name): rng.normal(0, scale, [4, 16]).astype(F) for v in before.graph.inputs}
    if observed:
        state.statistics = observe(before, list(observed), [feed], ENGINE)
    Pipeline((AssignFloatType(type=type_),)).run(state)
    verify(state.model, Phase.LOWERED)
    wanted = list(ENGINE.load(before, REFERENCE).run(feed).values())
    actual = list(ENGINE.load(state.model, REFERENCE).run(feed).values()) if type_ == "float16" else []
    return state, before, wanted, actual


def types(model: ir.Model) -> dict[str, str]:
    """Return the element type of each node's first result, by operator and number."""
    found = {}
    for graph in all_graphs(model):
        for node in graph:
            assert node.outputs[0].dtype is not None
            found[str(node.name)] = node.outputs[0].dtype.name
    return found


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_a_chain_gets_one_cast_at_each_border(type_: str) -> None:
    body = "a = MatMul(x, w) b = Relu(a) d = MatMul(b, v) y = Add(d, c)"
    state, _, wanted, actual = narrow(body, type_=type_)
    assert ops(state.model) == {"Cast": 2, "MatMul": 2, "Relu": 1, "Add": 1}
    assert state.model.graph.inputs[0].dtype is ir.DataType.FLOAT
    (output,) = state.model.graph.outputs
    assert (output.name, output.dtype) == ("y", ir.DataType.FLOAT)
    kinds = {n: t for n, t in types(state.model).items() if not n.endswith("/Cast")}
    assert set(kinds.values()) == {type_.upper()}
    assert {v.dtype.name for v in state.model.graph.initializers.values() if v.uses()} == {type_.upper()}  # type: ignore[union-attr]
    if actual:
        assert sqnr_db(wanted[0], actual[0]) > HALF_DB - 10


def test_a_value_with_several_readers_is_cast_once() -> None:
    state, *_ = narrow("a = MatMul(x, w) b = MatMul(x, v) y = Add(a, b)")
    assert ops(state.model)["Cast"] == 2


def test_a_lone_addition_between_float32_operators_stays_float32() -> None:
    state, _, wanted, actual = narrow("a = Exp(x) b = Add(a, c) y = Exp(b)", scale=0.1)
    assert "Cast" not in ops(state.model)
    np.testing.assert_array_equal(wanted[0], actual[0])


def test_a_lone_activation_between_products_follows_them() -> None:
    state, *_ = narrow("a = MatMul(x, w) b = Sigmoid(a) y = MatMul(b, v)")
    assert types(state.model)["Sigmoid_1"] == "FLOAT16"
    assert ops(state.model)["Cast"] == 2


def test_a_delicate_operator_stays_with_its_reason() -> None:
    weights = {**W, "axes": np.asarray([-1], np.int64)}
    state, *_ = narrow("a = MatMul(x, w) s = ReduceSum(a, axes) d = Div(a, s) y = MatMul(d, v)", weights=weights)
    assert types(state.model)["ReduceSum_1"] == "FLOAT"
    (remark,) = [r for r in state.remarks if r.node == "ReduceSum_1"]
    assert remark.reason == "delicate"
    assert "a long sum" in remark.text


def test_a_mask_that_overflows_keeps_what_reads_it_in_float32() -> None:
    weights = {**W, "mask": np.where(np.arange(16) > 8, F(-3e38), F(0))}
    state, _, wanted, actual = narrow(
        "a = MatMul(x, w) m = Add(a, mask) s = Softmax(m) y = MatMul(s, v)", weights=weights
    )
    assert [types(state.model)[n] for n in ("MatMul_0", "Add_1", "Softmax_2", "MatMul_3")] == [
        "FLOAT16", "FLOAT", "FLOAT", "FLOAT16",
    ]  # fmt: skip
    assert reasons(state) == ["constant-overflows", "too-large"]
    assert np.isfinite(actual[0]).all()
    assert sqnr_db(wanted[0], actual[0]) > HALF_DB - 10


def test_a_constant_below_float16_stays() -> None:
    weights = {**W, "eps": np.asarray(1e-9, F)}
    state, *_ = narrow("a = MatMul(x, w) b = Add(a, eps) y = MatMul(b, v)", weights=weights)
    assert types(state.model)["Add_1"] == "FLOAT"
    assert reasons(state) == ["constant-lost"]


def test_what_calibration_saw_beyond_the_range_stays() -> None:
    body = "a = MatMul(x, w) b = Mul(a, a) d = Tanh(b) y = MatMul(d, v)"
    state, _, _, actual = narrow(body, observed=("a", "b"), scale=300.0)
    assert types(state.model)["Mul_1"] == "FLOAT"
    assert types(state.model)["MatMul_3"] == "FLOAT16"
    assert set(reasons(state)) == {"too-large"}
    assert np.isfinite(actual[0]).all()


def test_integers_and_shapes_are_left_alone() -> None:
    body = "a = MatMul(x, w) s = Shape(a) r = Reshape(a, s) i = Cast<to=7>(a) f = Cast<to=1>(i) y = Add(r, f)"
    state, *_ = narrow(body)
    shape = next(n for n in state.model.graph if n.op_type == "Shape")
    assert shape.inputs[0] is not None
    assert shape.inputs[0].dtype is ir.DataType.FLOAT16
    assert next(n for n in state.model.graph if n.name == "Cast_4").outputs[0].dtype is ir.DataType.FLOAT
    assert "from-integers" in reasons(state)


def test_a_body_keeps_the_types_of_what_it_captures() -> None:
    proto = model_of(
        "float[4,16] x, bool p", "float[4,16] y",
        "a = MatMul(x, w) "
        "y = If(p) <then_branch = g1 () => (float[4,16] t) { m = MatMul(a, v) t = Relu(m) }, "
        "else_branch = g2 () => (float[4,16] e) { e = Exp(a) }>",
        W,
    )  # fmt: skip
    state = CompileState(import_exactly(proto), TARGET, phase=Phase.LOWERED)
    before = state.model.clone()
    Pipeline((AssignFloatType(type="float16"),)).run(state)
    verify(state.model, Phase.LOWERED)
    x = np.random.default_rng(0).normal(0, 1, (4, 16)).astype(F)
    for flag in (True, False):
        feed = {"x": x, "p": np.asarray(flag)}
        (wanted,) = ENGINE.load(before, REFERENCE).run(feed).values()
        (actual,) = ENGINE.load(state.model, REFERENCE).run(feed).values()
        assert actual.dtype == np.float32
        assert sqnr_db(wanted, actual) > HALF_DB - 10


@pytest.mark.parametrize("type_", ["float16", "bfloat16"])
def test_scales_take_the_type_of_their_neighbours(type_: str) -> None:
    weights = {
        "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "v": normal(3, 8, 8, 3, 3, scale=0.1),
    }  # fmt: skip
    weights["w"][3] = 0
    of = lab(
        model_of("float[2,4,8,8] x", "float[] y", "c = Conv(x, w, b) r = Relu(c) y = Conv(r, v)", weights),
        target=TARGET,
    )
    steps = (PlanQuantization(), InsertQdq(), FoldScales(), FuseQdq(), LowerTensorrt())
    wide = of.run(steps, Conv="static").model
    state = of.run((*steps, AssignFloatType(type=type_)), Conv="static")
    assert ops(state.model)["Cast"] == 1  # only at the output: what is quantized needs none
    for node in state.model.graph:
        neighbour = node.outputs[0] if node.op_type == "DequantizeLinear" else node.inputs[0]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert neighbour is not None
            scale = node.inputs[1]
            assert scale is not None
            assert scale.dtype is neighbour.dtype
            numbers = const_array(scale)
            assert numbers is not None
            assert (numbers.astype(F) > 0).all()
    if type_ == "float16":
        (feed, *_) = of.feeds
        (wanted,), (actual,) = (list(ENGINE.load(m, REFERENCE).run(feed).values()) for m in (wide, state.model))
        assert sqnr_db(wanted, actual) > 35  # a rounding that falls on the other side of a step is an error of a step


def test_a_second_run_changes_nothing() -> None:
    state, *_ = narrow("a = MatMul(x, w) b = Relu(a) y = MatMul(b, v)")
    assert AssignFloatType(type="float16").run(state) == 0


def test_float32_does_nothing() -> None:
    state, before, *_ = narrow("y = MatMul(x, w)", type_="float32")
    assert types(state.model) == types(before)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(PassError, match=r"unknown type 'half'; expected one of float32, float16, bfloat16"):
        narrow("y = MatMul(x, w)", type_="half")


def test_constants_that_are_read_narrow_only_are_not_stored_twice() -> None:
    proto = model_of("float[2,64] x", "float[2,64] y", "y = MatMul(x, w)", {"w": normal(2, 64, 64)})
    state = CompileState(import_exactly(proto), load_target("tensorrt-sm89"), Phase.LOWERED)
    assert AssignFloatType().run(state) > 0
    assert [v.dtype for v in state.model.graph.initializers.values()] == [ir.DataType.FLOAT16]

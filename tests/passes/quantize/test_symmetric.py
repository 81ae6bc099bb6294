"""Targets without zero points: symmetric int8 and float8 with float biases, and imported models planned anew."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.backends.readback import planned_fusions
from qcompiler.ir.graph import all_nodes, const_array, is_op
from qcompiler.passes.fold_scales import FoldScales
from qcompiler.passes.fuse_qdq import FuseQdq
from qcompiler.passes.import_qdq import ImportQdq
from qcompiler.passes.insert_qdq import InsertQdq
from qcompiler.passes.lower_onnxruntime import LowerOnnxruntime
from qcompiler.passes.plan_quantization import PlanQuantization
from qcompiler.quant.arithmetic import dequantize, quantize, weight_params
from qcompiler.quant.spec import QuantParams, QuantSource, QuantSpec
from qcompiler.targets.points import replanned
from qcompiler.targets.target import parse_target
from tests.passes.quantize.lab import import_exactly, lab, model_of, normal, ops, outputs

F = np.float32
ROWS = """
[[op]]
type = ["Conv"]
kind = "weighted"
forms = ["static", "static-float"]
data = [0]
weight = 1
weight_axis = 0
bias = 2
[[op]]
type = ["MatMul", "Gemm"]
kind = "weighted"
forms = ["static", "static-float"]
data = [0]
weight = 1
weight_axis = -1
bias = 2
[[op]]
type = ["Add"]
kind = "arithmetic"
forms = ["static"]
constants = true
[[op]]
type = ["MaxPool", "Reshape"]
kind = "mover"
forms = ["static"]
data = [0]
"""
HEAD = '[target]\nengine = "onnxruntime"\nmax_opset = 24\nactivations = ["Relu"]\n'
INT8 = parse_target(HEAD + 'activation = "int8"\nsymmetric = true\nbias = "float"\n' + ROWS, "s8")
FLOAT8 = parse_target(HEAD + 'activation = "float8e4m3fn"\nweight = "float8e4m3fn"\nbias = "float"\n' + ROWS, "f8")
ARM = parse_target(HEAD + 'activation = "int8"\n' + ROWS, "arm")
PLAN = PlanQuantization(matmul="static")
FUSED = (PLAN, InsertQdq(), FoldScales(), FuseQdq())
W = {
    "w": normal(1, 8, 4, 3, 3, scale=0.2), "b": normal(2, 8), "w2": normal(3, 8, 8, 1, 1, scale=0.3),
    "m": normal(4, 64, 32, scale=0.1), "mb": normal(5, 32), "m2": normal(6, 32, 32, scale=0.2), "k": normal(7, 8, 1, 1),
}  # fmt: skip
IMAGE, OUT = "float[n,4,8,8] x", "float[n,c,p,q] y"
MATRIX, COLUMNS = "float[n,5,64] x", "float[n,5,32] y"
CONVS = "c = Conv(x, w, b) r = Relu(c) y = Conv(r, w2)"
PRODUCTS = "h = MatMul(x, m) i = Add(h, mb) r = Relu(i) y = MatMul(r, m2)"
GEMMS = "g = Gemm(x, m, mb) r = Relu(g) y = Gemm(r, m2, mb)"
ROW_OUT = "float[n,32] y"


def made(target, body, x, y):
    return lab(model_of(x, y, body, W), target=target)


def points(state):
    return {name: p.spec for name, p in state.plan.points.items()}


@pytest.mark.parametrize("target", [INT8, FLOAT8], ids=lambda t: t.name)
@pytest.mark.parametrize(
    ("body", "x", "y", "calls"),
    [
        (CONVS, IMAGE, OUT, {"QuantizeLinear": 1, "QConv_1": 1, "Conv": 1}),  # the last one writes floats
        (PRODUCTS, MATRIX, COLUMNS, {"QuantizeLinear": 1, "QMatMul_1": 1, "QMatMul_2": 1}),
        (GEMMS, "float[n,64] x", ROW_OUT, {"QuantizeLinear": 1, "QGemm_1": 1, "QGemm_2": 1}),
    ],
)
def test_a_float_bias_and_an_activation_fuse_with_the_quantized_output(target, body, x, y, calls):
    given = made(target, body, x, y)
    state = given.run(FUSED, propose_static(given))
    stored = given.run(FUSED[:2], propose_static(given))
    found = ops(state.model)
    assert {k: v for k, v in found.items() if k != "DequantizeLinear"} == calls
    first = planned_fusions(state.model, state.plan)[0]
    call = next(n for n in all_nodes(state.model) if n.name == first.group)
    assert call.outputs[0].dtype.name.lower() == target.activation
    assert not any(v is not None and v.dtype is not None and v.dtype.name == "INT32" for v in call.inputs)
    feed = given.feeds[0]
    np.testing.assert_array_equal(outputs(state.model, feed)[0], outputs(stored.model, feed)[0])


def propose_static(given):
    return dict.fromkeys(given.groups, "static")


@pytest.mark.parametrize(("target", "least"), [(INT8, 30.0), (FLOAT8, 24.0)], ids=["s8", "f8"])
def test_the_numbers_stay_near_the_float_model(target, least):
    given = made(target, CONVS, IMAGE, OUT)
    lowered = given.run((*FUSED, LowerOnnxruntime()), propose_static(given))
    for feed in given.feeds:
        reference, got = outputs(given.base.model, feed)[0], outputs(lowered.model, feed)[0]
        # 8 bits of mantissa and exponent give e4m3 3 bits of precision: about 25 dB a product.
        assert 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()) > least


def test_float8_points_have_no_zero_points_and_reach_the_largest_value():
    given = made(FLOAT8, CONVS, IMAGE, OUT)
    state = given.run(FUSED[:2], propose_static(given))
    assert {n: (s.format, s.axis, s.symmetric) for n, s in points(state).items()} == {
        "x": ("float8e4m3fn", None, True),
        "r": ("float8e4m3fn", None, True),
        "Conv_0#1": ("float8e4m3fn", 0, True),
        "Conv_2#1": ("float8e4m3fn", 0, True),
    }
    constants = {str(v.name): const_array(v) for v in state.model.graph.initializers.values()}
    low, high = given.base.statistics.range("x")
    assert constants["x:scale"] == F(max(-low, high) / 448)
    assert float(constants["x:zero_point"]) == 0
    params = weight_params(W["w"], QuantSpec("float8e4m3fn", 0, symmetric=True))
    np.testing.assert_array_equal(constants["w:q"].astype(F), quantize(W["w"], params))
    np.testing.assert_array_equal(constants["w:scale"], np.abs(W["w"]).reshape(8, -1).max(1) / F(448))


def test_the_estimator_of_a_float_format_is_the_largest_value():
    given = made(FLOAT8, CONVS, IMAGE, OUT)
    state = given.run((PlanQuantization(matmul="static", estimator="mse"),), propose_static(given))
    assert state.plan.points["x"].source.estimator == "min-max"


def test_a_signed_target_with_zero_points_keeps_them():
    given = made(ARM, CONVS, IMAGE, OUT)
    state = given.run(FUSED[:2], propose_static(given))
    assert points(state)["r"] == QuantSpec("int8")
    constants = {str(v.name): const_array(v) for v in state.model.graph.initializers.values()}
    assert constants["r:zero_point"] == -128  # what Relu leaves
    assert constants["b:q"].dtype == np.int32
    assert not any(is_op(n, "Relu") for n in all_nodes(state.model))


def test_a_symmetric_range_keeps_the_relu_and_says_nothing():
    given = made(INT8, CONVS, IMAGE, OUT)
    state = given.run(FUSED[:2], propose_static(given))
    assert ops(state.model)["Relu"] == 1
    assert not any(r.reason == "activation-not-redundant" for r in state.remarks)


# ---- imported models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "scale", "zero", "expected"),
    [
        # Numbers are kept in the target's signed 8 bits: uint8 with zero point 128 has zero point 0 there.
        (INT8, 0.5, 0, (0.5, 0)),
        (INT8, 0.5, -128, (0.5 * 255 / 127, 0)),
        (INT8, 0.5, 27, (0.5 * 155 / 127, 0)),
        (FLOAT8, 0.5, 0, (0.5 * 128 / 448, 0)),
        (ARM, 0.5, 27, (0.5, 27)),
    ],
)
def test_imported_numbers_are_kept_or_cover_the_range_symmetrically(target, scale, zero, expected):
    made = replanned(QuantSource("fixed", scale=(scale,), zero_point=(zero,)), target)
    assert made.zero_point == (expected[1],)
    assert made.scale == (float(F(expected[0])),)


IMPORTED = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(wq, ws, wz) y = Conv(d, v) "


def imported(target, zero, weight_zero):
    rng = np.random.default_rng(5)
    weights = {
        "s": np.asarray(0.02, F), "z": np.asarray(zero, np.uint8), "ws": np.asarray(0.01, F),
        "wq": rng.integers(0, 256, (8, 4, 3, 3)).astype(np.uint8), "wz": np.asarray(weight_zero, np.uint8),
    }  # fmt: skip
    given = lab(model_of(IMAGE, OUT, IMPORTED, weights), target=target, calibrate=False)
    state = given.base
    ImportQdq().run(state)
    return given, given.run(FUSED[:2], {"Conv_3": "static-float"}), weights


def test_an_unsigned_import_with_its_zero_in_the_middle_is_the_same_signed():
    given, state, weights = imported(INT8, 128, 128)
    assert not any(r.reason == "replanned" for r in state.remarks)
    constants = {str(v.name): const_array(v) for v in state.model.graph.initializers.values()}
    assert constants["x:scale"] == F(0.02)
    assert constants["x:zero_point"].dtype == np.int8
    (stored,) = (a for n, a in constants.items() if n.endswith(":q"))
    np.testing.assert_array_equal(stored.astype(np.int64) + 128, weights["wq"])
    before = outputs(import_exactly(model_of(IMAGE, OUT, IMPORTED, weights)), given.feeds[0])[0]
    after = outputs(state.model, given.feeds[0])[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * np.abs(before).max())


def test_an_asymmetric_import_is_planned_anew_and_says_what_changed():
    given, state, weights = imported(INT8, 0, 100)
    (remark,) = (r for r in state.remarks if r.reason == "replanned")
    assert (remark.node, remark.done) == ("x", True)
    assert remark.text == (
        "imported as int8 with scale 0.02 and zero point -128; s8 takes int8 with scale 0.0401575, zero point 0"
    )
    spec = QuantSpec("int8", symmetric=True)
    constants = {str(v.name): const_array(v) for v in state.model.graph.initializers.values()}
    assert constants["x:scale"] == F(F(0.02) * 255 / 127)
    params = QuantParams(spec, np.asarray(constants["x:scale"], F))
    # The weights are quantized anew from the floats they stand for.
    floats = ((weights["wq"].astype(F) - 100) * F(0.01)).astype(F)
    wparams = weight_params(floats, QuantSpec("int8", 0, symmetric=True, narrow=True))
    x = given.feeds[0]["x"]
    reference = import_exactly(
        model_of(IMAGE, OUT, "y = Conv(x, w)", {"w": dequantize(quantize(floats, wparams), wparams)})
    )
    expected = outputs(reference, {"x": dequantize(quantize(x, params), params)})[0]
    np.testing.assert_allclose(
        outputs(state.model, given.feeds[0])[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_a_float8_target_plans_an_imported_model_in_its_own_format():
    _, state, _ = imported(FLOAT8, 128, 128)
    assert {s.format for s in points(state).values()} == {"float8e4m3fn"}
    assert [r.node for r in state.remarks if r.reason == "replanned"] == ["x"]

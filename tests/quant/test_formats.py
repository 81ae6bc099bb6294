"""Formats beyond integers, blocks and their scales: ranges, and every rounding against ONNX and ONNX Runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qcompiler.errors import CalibrationError
from qcompiler.quant.arithmetic import dequantize, quantize, spread, weight_params
from qcompiler.quant.formats import FORMATS, format_of
from qcompiler.quant.spec import QuantParams, QuantSpec, affine_params, outer_scale

F = np.float32
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
HALVES = np.asarray([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 100], F)
"""The numbers of float4e2m1, the ties between them, and two beyond the last."""
FLOAT4 = [0, 0, 0.5, 1, 1, 1, 1.5, 2, 2, 2, 3, 4, 4, 4, 6, 6, 6]
"""What they round to: at a tie, to the even mantissa."""


@pytest.mark.parametrize(
    ("name", "kind", "bits", "low", "high"),
    [
        ("int2", "int", 2, -2, 1),
        ("uint4", "int", 4, 0, 15),
        ("int8", "int", 8, -128, 127),
        ("float8e4m3fn", "float", 8, -448, 448),
        ("float8e5m2", "float", 8, -57344, 57344),
        ("float4e2m1", "float", 4, -6, 6),
    ],
)
def test_formats_know_their_range_and_types(name, kind, bits, low, high):
    storage = FORMATS[name]
    assert (storage.kind, storage.bits, storage.qmin, storage.qmax) == (kind, bits, low, high)
    assert storage.data_type.name.lower() == name
    assert storage.data_type.numpy() == storage.dtype
    if kind == "float":
        assert float(ml_dtypes.finfo(storage.dtype).max) == high
    assert not storage.scales_only


def test_scales_of_microscaling_hold_no_tensor():
    assert FORMATS["float8e8m0"].scales_only
    with pytest.raises(CalibrationError, match="float8e8m0 holds scales only"):
        QuantParams(QuantSpec("float8e8m0"), np.asarray(1, F))


def test_only_integers_have_zero_points():
    with pytest.raises(CalibrationError, match="float8e4m3fn has no zero point"):
        QuantParams(QuantSpec("float8e4m3fn"), np.asarray(1, F), np.asarray(1, np.int64))


def test_the_format_of_an_integer_type_is_found_and_that_of_a_float_is_none():
    assert format_of(FORMATS["uint4"].data_type) is FORMATS["uint4"]
    assert format_of(FORMATS["float8e4m3fn"].data_type) is None


def test_float4_rounds_ties_to_the_even_mantissa_and_saturates():
    params = QuantParams(QuantSpec("float4e2m1"), np.asarray(1, F))
    for sign in (1, -1):
        np.testing.assert_array_equal(quantize(sign * HALVES, params), sign * np.asarray(FLOAT4, F))


@pytest.mark.parametrize(("x", "q"), [(464.0, 448), (1e9, 448), (-1e9, -448), (17.0, 16), (19.0, 20), (2**-10, 0)])
def test_float8_saturates_and_rounds_to_even(x, q):
    params = QuantParams(QuantSpec("float8e4m3fn"), np.asarray(1, F))
    assert quantize(np.asarray(x, F), params) == q


def test_a_float_format_covers_the_range_without_a_zero_point():
    params = affine_params(QuantSpec("float8e4m3fn"), -1.0, 3.5)
    assert params.scale == F(3.5 / 448)
    assert params.zero_point == 0
    assert affine_params(QuantSpec("float8e5m2"), 0.0, 0.0).scale == 1


# ---- against ONNX and ONNX Runtime ----------------------------------------------------------------------------------


def _model(x, scale, zero, attributes, opset=21):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def _ours(x, params):
    return dequantize(quantize(x, params), params)


def _onnxruntime(model, x):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


CASES = [
    ("float8e4m3fn", None, 0, True),
    ("float8e4m3fn", 1, 0, True),
    ("float8e4m3fn", 1, 16, True),
    ("float8e5m2", 0, 0, True),
    ("float8e5m2", 0, 4, True),
    ("float4e2m1", 1, 16, False),  # ONNX Runtime 1.31 has no float4 on CPU
    ("int4", 1, 16, True),
    ("uint4", 0, 4, True),
    ("int8", 1, 8, True),
    ("int8", 0, 3, True),
]


@pytest.mark.parametrize(("name", "axis", "block", "runs"), CASES)
def test_rounding_is_that_of_onnx_and_of_onnx_runtime_bit_for_bit(name, axis, block, runs):
    x = np.random.default_rng(3).normal(0, 2, (8, 32)).astype(F)
    storage = FORMATS[name]
    params = weight_params(x, QuantSpec(name, axis, symmetric=storage.signed, block=block))
    tight = QuantParams(
        params.spec, (params.scale * F(0.7)).astype(F), params.zero_point
    )  # so that something saturates
    attributes = {} if axis is None else {"axis": axis}
    if block:
        attributes["block_size"] = block
    model = _model(x, tight.scale, tight.zero_point.astype(storage.dtype), attributes, 23 if not runs else 21)
    ours = _ours(x, tight)
    assert np.abs(ours - x).max() > 0
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {"x": x})[0], ours)
    if runs:
        np.testing.assert_array_equal(_onnxruntime(model, x), ours)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30), st.sampled_from([0.01, 0.3, 1.0, 7.0]))
def test_float8_rounding_is_that_of_the_reference_for_any_number(numbers, scale):
    x = np.asarray(numbers, F)
    for name in ("float8e4m3fn", "float8e5m2"):
        params = QuantParams(QuantSpec(name), np.asarray(scale, F))
        model = _model(x, params.scale, np.zeros((), FORMATS[name].dtype), {})
        np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {"x": x})[0], _ours(x, params))


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_a_block_takes_the_scale_of_its_own_largest_number():
    w = np.asarray([[1, -14], [7, 2], [0, 0], [0, 3.5]], F)
    params = weight_params(w, QuantSpec("int4", 0, symmetric=True, block=2))
    np.testing.assert_array_equal(params.scale, np.asarray([[1, 2], [1, 0.5]], F))
    np.testing.assert_array_equal(quantize(w, params), [[1, -7], [7, 1], [0, 0], [0, 7]])


def test_the_last_block_may_be_short():
    w = np.arange(1, 6, dtype=F).reshape(5, 1)
    params = weight_params(w, QuantSpec("int8", 0, symmetric=True, block=2))
    np.testing.assert_allclose(params.scale[:, 0], np.asarray([2, 4, 5]) / 127, rtol=1e-6)
    np.testing.assert_array_equal(spread(params.scale, params, w.shape)[:, 0], params.scale[[0, 0, 1, 1, 2], 0])


def test_asymmetric_blocks_have_zero_points_of_their_own():
    w = np.asarray([[0.0], [15.0], [-15.0], [0.0]], F)
    params = weight_params(w, QuantSpec("uint4", 0, block=2))
    np.testing.assert_array_equal(params.zero_point, [[0], [15]])
    np.testing.assert_array_equal(dequantize(quantize(w, params), params), w)


def test_scales_that_do_not_fit_the_tensor_are_refused():
    params = QuantParams(QuantSpec("int4", 0, block=16), np.ones((2, 3), F), np.zeros((2, 3), np.int64))
    with pytest.raises(CalibrationError, match=r"blocks of 16 along axis 0 of a tensor \(64, 3\) need scales of shape"):
        quantize(np.zeros((64, 3), F), params)
    with pytest.raises(CalibrationError, match="blocks of 16 need an axis and one scale per block"):
        QuantParams(QuantSpec("int4", None, block=16), np.asarray(1, F))


def test_nvfp4_scales_are_float8_under_one_float():
    w = np.random.default_rng(1).normal(0, 1, (64, 8)).astype(F)
    w[16:32, 0] = 0.0
    w[:16, 1] *= 1e-9
    params = weight_params(w, QuantSpec("float4e2m1", 0, symmetric=True, block=16, scale_format="float8e4m3fn"))
    assert params.outer == F(np.abs(w).max() / (6 * 448))
    np.testing.assert_array_equal(params.scale.astype(E4M3).astype(F), params.scale)
    assert params.scale.max() == 448
    assert params.scale[0, 1] == 2.0**-9  # the least positive number: a scale is never 0
    assert not quantize(w, params)[16:32, 0].any()
    # e2m1 errs by at most 1/4 of a number's power of two, and the scale by 1/16.
    error = np.abs(dequantize(quantize(w, params), params) - w)
    assert (error[:, 2:] <= np.abs(w[:, 2:]).max() * (1 / 6 + 1 / 16)).all()


@pytest.mark.parametrize(
    ("largest", "scale"),
    [(448.0, 1.0), (256.0, 1.0), (255.9, 0.5), (511.9, 1.0), (512.0, 2.0), (1.0, 2.0**-8), (0.0, 1.0)],
)
def test_mxfp8_scales_are_powers_of_two_by_the_floor_of_the_logarithm(largest, scale):
    w = np.zeros((32, 1), F)
    w[5] = largest
    params = weight_params(w, QuantSpec("float8e4m3fn", 0, symmetric=True, block=32, scale_format="float8e8m0"))
    assert params.scale[0, 0] == scale
    # Between 448 and 512 times the scale the element saturates, as the specification has it.
    assert quantize(w, params)[5, 0] == min(448, np.asarray(largest / scale, F).astype(E4M3).astype(F))


def test_scales_in_an_unknown_format_are_refused():
    with pytest.raises(CalibrationError, match="scales cannot be stored as int8"):
        affine_params(QuantSpec("float4e2m1", 0, block=2, scale_format="int8"), [[-1.0]], [[1.0]])


def test_the_outer_scale_of_nothing_is_one():
    assert outer_scale(QuantSpec("float4e2m1"), 0.0) == 1
    assert outer_scale(QuantSpec("float4e2m1"), 2688.0) == 1

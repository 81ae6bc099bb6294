"""Formats, specifications, parameters from ranges, biases, and the plan's JSON."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CalibrationError, PassError
from qcompiler.quant.arithmetic import bias_scale, dequantize, fit_bias, quantize, quantize_bias, weight_params
from qcompiler.quant.formats import FORMATS, format_of
from qcompiler.quant.plan import GroupChoice, Point, QuantPlan, use_point
from qcompiler.quant.spec import QuantParams, QuantSource, QuantSpec, affine_params, fixed_params

F = np.float32
MANY = settings(max_examples=200, deadline=None, derandomize=True)
REALS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@pytest.mark.parametrize(
    ("name", "low", "high", "dtype"),
    [("int8", -128, 127, "int8"), ("uint8", 0, 255, "uint8"), ("int4", -8, 7, "int4"), ("uint2", 0, 3, "uint2"),
     ("int16", -32768, 32767, "int16"), ("int32", -(2**31), 2**31 - 1, "int32")],
)  # fmt: skip
def test_formats_have_their_range_and_type(name, low, high, dtype):
    found = FORMATS[name]
    assert (found.qmin, found.qmax, found.dtype.name) == (low, high, dtype)
    assert format_of(found.data_type) is found


def test_a_float_type_is_no_format():
    assert format_of(ir.DataType.FLOAT) is None
    assert format_of(None) is None


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (QuantSpec("uint8"), (0, 255)),
        (QuantSpec("int8"), (-128, 127)),
        (QuantSpec("int8", narrow=True), (-127, 127)),
        (QuantSpec("int8", bits=7), (-64, 63)),
        (QuantSpec("int8", bits=7, narrow=True), (-63, 63)),
        (QuantSpec("uint8", bits=7), (0, 127)),
        (QuantSpec("uint8", narrow=True), (0, 255)),
    ],
)
def test_limits_of_a_specification(spec, limits):
    assert spec.limits == limits


@MANY
@given(REALS, REALS, st.sampled_from(["uint8", "int8", "uint16", "int16", "uint4"]))
def test_a_range_keeps_zero_exact_and_both_ends_within_a_step(first, second, name):
    low, high = sorted((first, second))
    params = affine_params(QuantSpec(name), low, high)
    scale = float(params.scale)
    zero = np.zeros((), F)
    assert dequantize(quantize(zero, params), params) == 0.0
    for end in (min(low, 0.0), max(high, 0.0)):
        back = float(dequantize(quantize(np.asarray(end, F), params), params))
        assert abs(back - end) <= scale * 1.001 + 1e-6 * abs(end)


@MANY
@given(REALS, REALS)
def test_a_symmetric_range_has_zero_point_zero_and_keeps_the_sign(first, second):
    low, high = sorted((first, second))
    params = affine_params(QuantSpec("int8", symmetric=True, narrow=True), low, high)
    assert params.zero_point == 0
    ends = np.asarray([low, high, -low, -high], F)
    q = quantize(ends, params)
    assert np.abs(q).max() <= 127
    np.testing.assert_array_equal(q[:2], -q[2:])


def test_parameters_of_known_ranges():
    u8 = affine_params(QuantSpec("uint8"), -1.0, 3.0)
    assert (u8.scale, u8.zero_point) == (F(4 / 255), 64)
    positive = affine_params(QuantSpec("uint8"), 2.0, 5.0)
    assert (positive.scale, positive.zero_point) == (F(5 / 255), 0)
    negative = affine_params(QuantSpec("uint8"), -5.0, -2.0)
    assert (negative.scale, negative.zero_point) == (F(5 / 255), 255)
    s8 = affine_params(QuantSpec("int8", symmetric=True, narrow=True), [-1.0, 0.5], [0.25, 2.0])
    np.testing.assert_array_equal(s8.scale, np.asarray([1 / 127, 2 / 127], F))
    seven = affine_params(QuantSpec("int8", symmetric=True, narrow=True, bits=7), -6.3, 1.0)
    assert seven.scale == F(0.1)
    unsigned = affine_params(QuantSpec("uint8", symmetric=True), -1.0, 1.0)
    assert unsigned.zero_point == 128


@pytest.mark.parametrize("spec", [QuantSpec("uint8"), QuantSpec("int8", symmetric=True)])
@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-45])
def test_a_range_without_extent_still_has_a_positive_normal_scale(spec, value):
    params = affine_params(spec, value, value)
    assert params.scale >= np.finfo(F).tiny
    assert dequantize(quantize(np.zeros(1, F), params), params) == 0.0


def test_seven_bit_weights_stay_in_seven_bits():
    weight = np.random.default_rng(1).normal(size=(4, 9)).astype(F)
    spec = QuantSpec("int8", axis=0, symmetric=True, narrow=True, bits=7)
    params = weight_params(weight, spec)
    q = quantize(weight, params)
    assert np.abs(q).max(axis=1).tolist() == [63, 63, 63, 63]
    assert np.abs(dequantize(q, params) - weight).max() <= params.scale.max() / 2 * 1.0001


def test_parameters_that_are_none_are_refused():
    spec = QuantSpec("uint8")
    zero = np.zeros((), np.int64)
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(CalibrationError, match="not a positive finite number"):
            QuantParams(spec, np.asarray(bad, F), zero)
    with pytest.raises(CalibrationError, match="zero point lies outside uint8"):
        QuantParams(spec, np.asarray(1, F), np.asarray(256))
    with pytest.raises(CalibrationError, match="differ in shape"):
        QuantParams(spec, np.ones(3, F), zero)


def test_fixed_numbers_come_back_as_they_were():
    scalar = fixed_params(QuantSpec("uint8"), QuantSource("fixed", scale=(0.5,), zero_point=(3,)))
    assert (scalar.scale.shape, float(scalar.scale), int(scalar.zero_point)) == ((), 0.5, 3)
    per_axis = fixed_params(QuantSpec("int8", axis=0), QuantSource("fixed", scale=(0.5, 1.0), zero_point=(0, 0)))
    assert per_axis.scale.shape == (2,)


def weight_numbers(scale: object, axis: int | None = 0) -> QuantParams:
    array = np.asarray(scale, F)
    return QuantParams(QuantSpec("int8", axis if array.ndim else None, symmetric=True), array,
                       np.zeros(array.shape, np.int64))  # fmt: skip


def test_a_bias_that_fits_leaves_the_weight_scale():
    weight = weight_numbers([0.01, 0.02])
    bias = np.asarray([1.0, -2.0], F)
    fitted = fit_bias(weight, 0.1, bias, np.zeros(2, np.bool_))
    np.testing.assert_array_equal(fitted.scale, weight.scale)


@pytest.mark.parametrize("scale", [[1e-9, 0.02], 1e-9])
def test_a_bias_beyond_int32_raises_the_weight_scale_until_it_fits(scale):
    weight, bias = weight_numbers(scale), np.asarray([3000.0, -2.0], F)
    x_scale = 1e-4
    fitted = fit_bias(weight, x_scale, bias, np.zeros(2, np.bool_))
    unit = np.broadcast_to(fitted.scale.astype(np.float64) * x_scale, bias.shape)
    q = quantize_bias(bias, unit.astype(F))
    assert np.abs(q.astype(np.int64)).max() <= 2**30 * 1.0001
    np.testing.assert_allclose(q * unit, bias, rtol=1e-6)
    if weight.scale.ndim:
        assert fitted.scale[1] == weight.scale[1]


def test_a_channel_without_weights_takes_the_scale_that_resolves_its_bias():
    weight = weight_numbers([1.0, 0.01, 1.0])
    bias = np.asarray([0.3, 0.3, 0.0], F)
    fitted = fit_bias(weight, 0.1, bias, np.asarray([True, False, True]))
    unit = fitted.scale.astype(np.float64) * 0.1
    back = quantize_bias(bias, unit.astype(F)) * unit
    assert abs(back[0] - 0.3) < 1e-7
    assert fitted.scale[1] == F(0.01)
    assert (fitted.scale > 0).all()


@MANY
@given(st.floats(1e-6, 1.0), st.floats(1e-8, 1.0), st.floats(-1e4, 1e4, width=32))
def test_a_quantized_bias_is_off_by_at_most_half_its_unit(x_scale, w_scale, value):
    x = QuantParams(QuantSpec("uint8"), np.asarray(x_scale, F))
    weight = fit_bias(weight_numbers([w_scale]), float(x.scale), np.asarray([value], F), np.zeros(1, np.bool_))
    unit = bias_scale(x, weight)
    assert unit == F(x.scale * weight.scale[0])
    q = quantize_bias(np.asarray([value], F), unit)
    assert q.dtype == np.int32
    assert abs(float(q[0]) * float(unit[0]) - value) <= 0.5 * float(unit[0]) * 1.0001


def test_a_bias_saturates_instead_of_wrapping():
    assert quantize_bias(np.asarray([1e30, -1e30], F), np.asarray(1.0, F)).tolist() == [2**31 - 1, -(2**31)]


def plan() -> QuantPlan:
    weight = use_point("conv", 1)
    return QuantPlan(
        choices={"conv": GroupChoice("static", "measured"), "gemm": GroupChoice("float")},
        points={
            "x": Point(QuantSpec("uint8"), QuantSource("observed", estimator="min-max")),
            "y": Point(QuantSpec("uint8"), QuantSource("fixed", scale=(0.5,), zero_point=(7,))),
            "z": Point(QuantSpec("uint8"), QuantSource("shared", ("y",))),
            weight: Point(QuantSpec("int8", axis=0, symmetric=True, narrow=True, bits=7), QuantSource("weight")),
            use_point("conv", 2): Point(QuantSpec("int32", 0, symmetric=True), QuantSource("derived", ("x", weight))),
        },
        engine_forms={"emit:conv": "qoperator"},
    )


def test_a_plan_survives_json_and_its_text_is_canonical():
    made = plan()
    again = QuantPlan.from_json(made.to_json())
    assert again == made
    assert again.to_json() == made.to_json()
    assert json.loads(made.to_json())["choices"]["conv"] == {"form": "static", "why": "measured"}


def test_a_group_that_the_plan_does_not_know_is_float():
    assert (plan().form("conv"), plan().form("elsewhere")) == ("static", "float")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": {"x": {}}, "choices": {}, "engine_forms": {}}',
                                  '{"points": {}, "choices": {"a": {"what": 1}}, "engine_forms": {}}'])  # fmt: skip
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PassError, match="not a quantization plan"):
        QuantPlan.from_json(text)

"""The NumPy truth of integer operators against ONNX Runtime's kernels, run as written."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.quant import operators as truth
from qcompiler.quant.arithmetic import dequantize, quantize
from qcompiler.quant.operators import Quantized
from qcompiler.quant.spec import QuantParams, QuantSpec, affine_params
from qcompiler.quant.window import resolve_window
from tests.quant.ort_operator import run_operator

MS = "com.microsoft"
U8, S8 = QuantSpec("uint8"), QuantSpec("int8", symmetric=True)
SEEDS = settings(max_examples=40, deadline=None, derandomize=True)
# Seen on ONNX Runtime 1.31 over random scales: QLinearAdd differs at 7 elements of a million, QLinearAveragePool at 3
# of ten thousand (0.3 % at worst), QLinearMul and QLinearGlobalAveragePool nowhere; always by one step.
TIES = 0.005


def params(spec: QuantSpec, scale: object, zero: object = 0) -> QuantParams:
    s = np.asarray(scale, np.float32)
    return QuantParams(spec, s, np.broadcast_to(np.asarray(zero, np.int64), s.shape).copy())


def random(rng: np.random.Generator, shape: tuple[int, ...], spec: QuantSpec, scale: object, zero: object) -> Quantized:
    storage = spec.storage
    q = rng.integers(storage.qmin, storage.qmax + 1, shape).astype(storage.dtype)
    return Quantized(q, params(spec, scale, zero))


def activation(rng: np.random.Generator, shape: tuple[int, ...], spec: QuantSpec = U8) -> Quantized:
    low = spec.storage.qmin
    return random(rng, shape, spec, rng.uniform(0.001, 0.1), int(rng.integers(low, low + 256)))


def numbers(p: QuantParams) -> list[np.ndarray]:
    return [p.scale, p.zero_point.astype(p.spec.storage.dtype)]


def flat(x: Quantized) -> list[np.ndarray]:
    return [x.q, *numbers(x.params)]


def fitting(real: np.ndarray, spec: QuantSpec = U8) -> QuantParams:
    """Parameters whose range holds most of the numbers, so that both ends saturate now and then."""
    return affine_params(spec, np.quantile(real, 0.02), np.quantile(real, 0.98))


def assert_close(found: np.ndarray, wanted: np.ndarray, share: float = 0.0) -> None:
    assert found.shape == wanted.shape
    difference = np.abs(found.astype(np.int64) - wanted.astype(np.int64))
    assert int(difference.max(initial=0)) <= (1 if share else 0)
    # A handful of elements is no statistic: one of them may always be a tie.
    assert int((difference > 0).sum()) <= max(share * difference.size, 1 if share else 0)


def conv_weight(rng: np.random.Generator, shape: tuple[int, ...], per_channel: bool) -> Quantized:
    scale = rng.uniform(0.002, 0.02, shape[0]) if per_channel else rng.uniform(0.002, 0.02)
    return random(rng, shape, QuantSpec("int8", axis=0 if per_channel else None, symmetric=True), scale, 0)


CONVOLUTIONS = [
    ((2, 3, 9), (4, 3, 3), {}),
    ((1, 4, 11), (6, 2, 3), {"group": 2, "strides": [2], "pads": [1, 0]}),
    ((1, 3, 8, 7), (5, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((1, 3, 8, 7), (5, 3, 3, 2), {"pads": [0, 1, 2, 0], "strides": [2, 1]}),
    ((2, 4, 9, 9), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((1, 4, 9, 10), (6, 2, 3, 3), {"group": 2, "dilations": [2, 1]}),
    ((1, 2, 9, 10), (3, 2, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ((1, 2, 9, 10), (3, 2, 3, 4), {"auto_pad": "SAME_LOWER", "strides": [1, 1]}),
    ((1, 2, 9, 10), (3, 2, 3, 4), {"auto_pad": "VALID"}),
    ((1, 5, 4, 4), (7, 5, 1, 1), {}),
    ((1, 2, 5, 6, 4), (3, 2, 3, 2, 2), {"pads": [1, 0, 0, 1, 1, 0], "strides": [2, 1, 1]}),
]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "attributes"), CONVOLUTIONS)
def test_convolution_is_that_of_onnxruntime_bit_for_bit(shape, kernel, attributes, with_bias, per_channel):
    rng = np.random.default_rng(len(shape) * 100 + kernel[0])
    x, w = activation(rng, shape), conv_weight(rng, kernel, per_channel)
    unit = x.params.scale * w.params.scale
    bias = rng.integers(-4000, 4000, kernel[0]).astype(np.int32) if with_bias else None
    window = resolve_window(
        kernel[2:], shape[2:], strides=attributes.get("strides"), dilations=attributes.get("dilations"),
        pads=attributes.get("pads"), auto_pad=attributes.get("auto_pad", "NOTSET"),
    )  # fmt: skip
    y = params(U8, float(np.mean(unit)) * 300, 120)
    inputs = [*flat(x), *flat(w), *numbers(y), *([] if bias is None else [bias])]
    (wanted,) = run_operator("QLinearConv", inputs, attributes=attributes)
    found = truth.qlinear_conv(x, w, y, window, bias=bias, group=attributes.get("group", 1))
    assert_close(found, wanted)
    assert len(np.unique(found)) > 20


def test_convolution_pads_with_the_zero_point():
    x = Quantized(np.full((1, 1, 1, 1), 7, np.uint8), params(U8, 1.0, 7))
    w = Quantized(np.ones((1, 1, 3, 3), np.int8), params(S8, 1.0))
    y = params(U8, 1.0, 9)
    found = truth.qlinear_conv(x, w, y, resolve_window((3, 3), (1, 1), pads=[1, 1, 1, 1]))
    assert found.tolist() == [[[[9]]]]


@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24)])
def test_matmul_is_that_of_onnxruntime_bit_for_bit(shape, per_column):
    rng = np.random.default_rng(sum(shape))
    x = activation(rng, shape)
    scale = rng.uniform(0.002, 0.02, 16) if per_column else np.float32(0.013)
    w = random(rng, (24, 16), QuantSpec("int8", axis=1 if per_column else None, symmetric=True), scale, 0)
    y = fitting(x.real @ w.real)
    (wanted,) = run_operator("QLinearMatMul", [*flat(x), *flat(w), *numbers(y)])
    assert_close(truth.qlinear_matmul(x, w, y), wanted)


def test_matmul_of_two_activations_with_zero_points():
    rng = np.random.default_rng(3)
    a, b = activation(rng, (2, 4, 5, 8)), activation(rng, (2, 4, 8, 6))
    y = fitting(a.real @ b.real)
    (wanted,) = run_operator("QLinearMatMul", [*flat(a), *flat(b), *numbers(y)])
    assert_close(truth.qlinear_matmul(a, b, y), wanted)


@pytest.mark.parametrize("quantized", [True, False])
def test_gemm_adds_its_int32_bias_to_the_accumulator(quantized):
    rng = np.random.default_rng(5)
    x, bias = activation(rng, (6, 32)), rng.integers(-9000, 9000, 12).astype(np.int32)
    w = random(rng, (32, 12), QuantSpec("int8", axis=1, symmetric=True), rng.uniform(0.002, 0.02, 12), 0)
    real = x.real @ w.real + bias * (x.params.scale * w.params.scale).astype(np.float64)
    y = fitting(real)
    inputs = [*flat(x), *flat(w), bias, *(numbers(y) if quantized else [])]
    (wanted,) = run_operator("QGemm", inputs, domain=MS, attributes={"transA": 0, "transB": 0, "alpha": 1.0})
    if quantized:
        assert_close(truth.qlinear_matmul(x, w, y, bias), wanted)
    else:
        np.testing.assert_allclose(truth.matmul_integer_to_float(x, w, bias), wanted, rtol=2**-23, atol=0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_integer_to_float_is_within_two_roundings(with_bias):
    rng = np.random.default_rng(7)
    x, bias = activation(rng, (3, 5, 40)), rng.normal(size=20).astype(np.float32)
    w = random(rng, (40, 20), QuantSpec("int8", axis=1, symmetric=True), rng.uniform(0.002, 0.02, 20), 0)
    order = [x.q, w.q, x.params.scale, w.params.scale, numbers(x.params)[1], numbers(w.params)[1]]
    inputs = [*order, *([bias] if with_bias else [])]
    (wanted,) = run_operator("MatMulIntegerToFloat", inputs, domain=MS)
    found = truth.matmul_integer_to_float(x, w, bias if with_bias else None)
    # Multiply and add round once each, or once together where the processor fuses them.
    reach = np.abs(x.real @ w.real) + np.abs(bias)
    assert (np.abs(found.astype(np.float64) - wanted) <= reach * 2.0**-22).all()
    assert found.dtype == np.float32


@SEEDS
@given(st.integers(0, 2**32 - 1), st.floats(-50, 50), st.floats(1e-3, 50), st.integers(0, 64))
def test_dynamic_quantize_linear_is_that_of_onnxruntime(seed, middle, spread, size):
    x = (np.random.default_rng(seed).normal(middle, spread, size)).astype(np.float32)
    found = truth.dynamic_quantize_linear(x)
    q, scale, zero = run_operator("DynamicQuantizeLinear", [x], outputs=3)
    assert found.params.scale == scale
    assert found.params.zero_point == zero
    assert_close(found.q, q)


def test_dynamic_quantize_linear_of_zeros_has_scale_one():
    found = truth.dynamic_quantize_linear(np.zeros(4, np.float32))
    assert (found.params.scale, found.params.zero_point, found.q.tolist()) == (1.0, 0, [0, 0, 0, 0])


@pytest.mark.parametrize(("op_type", "exact"), [("QLinearAdd", np.add), ("QLinearMul", np.multiply)])
@pytest.mark.parametrize("shapes", [((3, 40, 50), (3, 40, 50)), ((3, 40, 50), (50,)), ((60, 1), (1, 70))])
def test_binary_operators_are_within_a_step_of_onnxruntime(op_type, exact, shapes):
    rng = np.random.default_rng(11)
    a, b = (activation(rng, s) for s in shapes)
    y = fitting(exact(a.real, b.real))
    (wanted,) = run_operator(op_type, [*flat(a), *flat(b), *numbers(y)], domain=MS)
    function = {"QLinearAdd": truth.qlinear_add, "QLinearMul": truth.qlinear_mul}[op_type]
    assert_close(function(a, b, y), wanted, TIES)


def test_addition_of_equal_scales_rounds_half_to_even():
    a, b = (Quantized(np.asarray([[v]], np.uint8), params(U8, 0.5)) for v in (3, 2))
    assert truth.qlinear_add(a, b, params(U8, 1.0)).item() == 2  # 2.5
    assert truth.qlinear_add(a, a, params(U8, 2.0)).item() == 2  # 1.5


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_concatenation_is_that_of_onnxruntime_bit_for_bit(axis):
    rng = np.random.default_rng(13)
    parts = [activation(rng, (4, 5, 6)) for _ in range(3)]
    y = params(U8, 0.05, 100)
    parts.append(random(rng, (4, 5, 6), U8, 0.05, 100))
    inputs = [*numbers(y), *itertools.chain.from_iterable(flat(p) for p in parts)]
    (wanted,) = run_operator("QLinearConcat", inputs, domain=MS, attributes={"axis": axis})
    assert_close(truth.qlinear_concat(parts, axis, y), wanted)


POOLS = [
    ((1, 3, 9, 8), [3, 3], {}),
    ((1, 3, 9, 8), [3, 2], {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
    ((1, 3, 9, 8), [3, 2], {"strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1}),
    ((1, 3, 10, 9), [3, 3], {"strides": [2, 2], "ceil_mode": 1}),
    ((1, 3, 10, 9), [3, 3], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
]


@pytest.mark.parametrize(("shape", "kernel", "attributes"), POOLS)
def test_average_pool_is_within_a_step_of_onnxruntime(shape, kernel, attributes):
    rng = np.random.default_rng(17)
    x = activation(rng, shape)
    y = fitting(x.real / 3)
    window = resolve_window(
        kernel, shape[2:], strides=attributes.get("strides"), pads=attributes.get("pads"),
        auto_pad=attributes.get("auto_pad", "NOTSET"), ceil_mode=bool(attributes.get("ceil_mode")),
    )  # fmt: skip
    (wanted,) = run_operator(
        "QLinearAveragePool", [*flat(x), *numbers(y)], domain=MS, attributes={"kernel_shape": kernel, **attributes}
    )
    found = truth.qlinear_average_pool(x, y, window, bool(attributes.get("count_include_pad")))
    assert_close(found, wanted, TIES)


def test_global_average_pool_is_within_a_step_of_onnxruntime():
    rng = np.random.default_rng(19)
    x = activation(rng, (2, 300, 7, 5))
    y = fitting(x.real.mean(axis=(2, 3)))
    inputs = [*flat(x), *numbers(y)]
    (wanted,) = run_operator("QLinearGlobalAveragePool", inputs, domain=MS, attributes={"channels_last": 0})
    assert_close(truth.qlinear_global_average_pool(x, y), wanted, TIES)


def test_sigmoid_table_is_within_a_step_of_onnxruntime():
    y = params(U8, 1 / 256, 0)
    for scale, zero in ((0.05, 128), (0.02, 10), (0.1, 255), (1e-3, 0)):
        x = Quantized(np.arange(256, dtype=np.uint8), params(U8, scale, zero))
        (wanted,) = run_operator("QLinearSigmoid", [*flat(x), *numbers(y)], domain=MS)
        assert_close(truth.qlinear_sigmoid(x, y), wanted, TIES)


def test_sigmoid_does_not_overflow_at_either_end():
    x = Quantized(np.asarray([-128, 0, 127], np.int8), params(S8, 100.0))
    assert truth.qlinear_sigmoid(x, params(U8, 1 / 256)).tolist() == [0, 128, 255]


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3])
def test_leaky_relu_table_is_within_a_step_of_onnxruntime(alpha):
    for scale, zero in ((0.05, 128), (0.02, 10), (0.1, 200)):
        x = Quantized(np.arange(256, dtype=np.uint8), params(U8, scale, zero))
        y = fitting(np.where(x.real > 0, x.real, alpha * x.real))
        (wanted,) = run_operator("QLinearLeakyRelu", [*flat(x), *numbers(y)], domain=MS, attributes={"alpha": alpha})
        assert_close(truth.qlinear_leaky_relu(x, y, alpha), wanted, TIES)


@pytest.mark.parametrize("spec", [U8, QuantSpec("int8"), QuantSpec("uint16"), QuantSpec("int16")])
def test_quantize_and_dequantize_are_those_of_onnxruntime(spec):
    rng = np.random.default_rng(23)
    x = np.concatenate([rng.normal(0, 3, 4000), (np.arange(-40, 40) + 0.5) * 0.25, [1e9, -1e9]]).astype(np.float32)
    p = params(spec, 0.25, spec.storage.qmin + 20)
    (wanted,) = run_operator("QuantizeLinear", [x, *numbers(p)])
    np.testing.assert_array_equal(quantize(x, p), wanted)
    (back,) = run_operator("DequantizeLinear", [wanted, *numbers(p)])
    np.testing.assert_array_equal(dequantize(wanted, p), back)


def test_quantize_per_channel_along_an_inner_axis():
    rng = np.random.default_rng(29)
    x = rng.normal(0, 1, (3, 4, 5)).astype(np.float32)
    p = params(QuantSpec("int8", axis=1, symmetric=True), [0.01, 0.02, 0.03, 0.04])
    (wanted,) = run_operator("QuantizeLinear", [x, *numbers(p)], attributes={"axis": 1})
    np.testing.assert_array_equal(quantize(x, p), wanted)


def test_an_activation_inside_a_group_clips_in_steps_of_the_output():
    x = Quantized(np.arange(256, dtype=np.uint8).reshape(1, 256), params(U8, 1.0, 128))
    one = Quantized(np.eye(256, dtype=np.int8), params(S8, 1.0))
    y = params(U8, 1.0, 100)
    plain = truth.qlinear_matmul(x, one, y)
    assert (plain.min(), plain.max()) == (0, 227)
    relu = truth.qlinear_matmul(x, one, y, bounds=(0.0, np.inf))
    np.testing.assert_array_equal(relu, np.maximum(plain, 100))
    clip = truth.qlinear_matmul(x, one, y, bounds=(-3.4, 6.0))
    np.testing.assert_array_equal(clip, np.clip(plain, 97, 106))
    over = truth.qlinear_matmul(x, one, y, bounds=(1e6, np.inf))
    assert set(over.reshape(-1).tolist()) == {255}


def test_accumulators_beyond_int32_are_exact():
    x = Quantized(np.full((1, 2**17), 255, np.uint8), params(U8, 1.0))
    w = Quantized(np.full((2**17, 1), 127, np.int8), params(S8, 1.0))
    assert truth.matmul_integer_to_float(x, w).item() == np.float32(255 * 127 * 2**17)


@pytest.mark.parametrize(
    ("size", "kernel", "given", "expected"),
    [
        (7, 3, {}, (0, 0, 0)),
        (7, 3, {"strides": [2], "auto_pad": "SAME_UPPER"}, (1, 1, 0)),
        (8, 3, {"strides": [2], "auto_pad": "SAME_UPPER"}, (0, 1, 0)),
        (8, 3, {"strides": [2], "auto_pad": "SAME_LOWER"}, (1, 0, 0)),
        (8, 3, {"strides": [2], "ceil_mode": True}, (0, 0, 1)),
        (7, 3, {"strides": [2], "ceil_mode": True}, (0, 0, 0)),
        # A further window would start in the padding behind the input.
        (2, 1, {"strides": [3], "pads": [0, 1], "ceil_mode": True}, (0, 1, 0)),
    ],
)
def test_padding_is_resolved_as_the_specification_says(size, kernel, given, expected):
    found = resolve_window([kernel], [size], **given)
    assert (found.begin[0], found.end[0], found.extra[0]) == expected


def test_a_window_that_does_not_fit_is_refused():
    from qcompiler.errors import ModelError

    with pytest.raises(ModelError, match="reaches over 5 elements does not fit in 4"):
        resolve_window([3], [4], dilations=[2])
    with pytest.raises(ModelError, match="unknown auto_pad 'SAME'"):
        resolve_window([3], [4], auto_pad="SAME")

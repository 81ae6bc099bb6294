"""The steps' arithmetic against the NumPy truth, bit for bit."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the references need torch")

from qcompiler.backends.triton.references import REFERENCES, exact_conv  # noqa: E402
from qcompiler.kernels.catalog import contract_of, reference_of  # noqa: E402
from qcompiler.quant import operators as truth  # noqa: E402
from qcompiler.quant.spec import QuantParams, QuantSpec  # noqa: E402
from qcompiler.quant.window import resolve_window  # noqa: E402
from tests.quant.ort_operator import run_operator  # noqa: E402

RNG = np.random.default_rng(7)


def _int8(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def _params(scale: float, zero: int) -> QuantParams:
    return QuantParams(QuantSpec("int8"), np.asarray(scale, np.float32), np.asarray(zero, np.int64))


def _torch(given: dict) -> dict:
    return {k: torch.from_numpy(np.array(v, order="C")) if isinstance(v, np.ndarray) else v for k, v in given.items()}


@pytest.mark.parametrize(("k", "zero"), [(16, -128), (172, 5), (2048, 127)])
def test_matmul_is_the_kernels_reference(k: int, zero: int) -> None:
    a, w = _int8(7, k), _int8(1, 12, k)
    given = {
        "a": a[None], "w": w, "multiplier": RNG.uniform(1e-4, 1e-3, 12).astype(np.float32),
        "offset": (-zero * w[0].astype(np.int64).sum(1)).astype(np.int32), "out_zero": 3,
    }  # fmt: skip
    contract = contract_of("int8_matmul")
    options = contract.options({"offset": "channel", "out": "int8"})
    wanted = reference_of("int8_matmul").reference(given, options)["out"]
    (found,) = REFERENCES["int8_matmul"]({**_torch(given), "out": "int8"})
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize(("stride", "dilation", "pad", "zero"), [(1, 1, 1, 9), (2, 1, 0, -128), (1, 2, 2, 0)])
def test_conv_is_the_truth(channels: int, stride: int, dilation: int, pad: int, zero: int) -> None:
    x, w = _int8(2, channels, 9, 8), _int8(6, channels, 3, 3)
    bias = RNG.integers(-5000, 5000, 6).astype(np.int32)
    px, py = _params(0.02, zero), _params(0.3, -4)
    pw = QuantParams(QuantSpec("int8", 0), RNG.uniform(0.01, 0.02, 6).astype(np.float32), np.zeros(6, np.int64))
    window = resolve_window((3, 3), (9, 8), strides=(stride,) * 2, dilations=(dilation,) * 2, pads=(pad,) * 4)
    wanted = truth.qlinear_conv(truth.Quantized(x, px), truth.Quantized(w, pw), py, window, bias=bias)
    given = {
        "x": x.transpose(0, 2, 3, 1), "w": w.transpose(0, 2, 3, 1), "group": 1, "x_zero": zero, "out": "int8",
        "offset": (bias - zero * w.astype(np.int64).sum((1, 2, 3))).astype(np.int32), "out_zero": -4,
        "multiplier": (np.float32(0.02) * pw.scale / np.float32(0.3)).astype(np.float32),
        **{f"pad_{s}": pad for s in ("top", "left", "bottom", "right")},
        **{f"{n}_{d}": v for n, v in (("stride", stride), ("dilation", dilation)) for d in "hw"},
    }  # fmt: skip
    (found,) = REFERENCES["int8_conv"](_torch(given))
    np.testing.assert_array_equal(found.numpy().transpose(0, 3, 1, 2), wanted)


def test_conv_stays_exact_where_float32_alone_would_not() -> None:
    x, w = np.full((1, 2048, 3, 3), 127.0, np.float32), np.full((1, 2048, 3, 3), 127, np.int8)
    w[0, 0, 0, 0] = 126
    numbers = {f"{n}_{d}": 1 for n in ("stride", "dilation") for d in "hw"}
    found = exact_conv(torch.from_numpy(x), torch.from_numpy(w), numbers, 1)
    assert int(found) == 2048 * 9 * 127 * 127 - 127


@pytest.mark.parametrize("activation", ["none", "relu", "clip"])
@pytest.mark.parametrize("op", ["add", "mul", "convert"])
def test_pointwise_is_the_kernels_reference(op: str, activation: str) -> None:
    a, b = _int8(2, 5, 4), _int8(1, 5, 4)
    given = {"a": a, "a_scale": 0.03, "a_zero": 7, "out_scale": 0.07, "out_zero": 2, "low": -0.4, "high": 1.3}
    given |= {"b": b, "b_scale": 0.05, "b_zero": -9} if op != "convert" else {}
    options = contract_of("pointwise").options({"op": op, "out": "int8", "activation": activation})
    wanted = reference_of("pointwise").reference(given, options)["out"]
    (found,) = REFERENCES["pointwise"]({**_torch(given), **options})
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_quantize_and_dequantize_are_the_kernels_reference(dtype: str) -> None:
    x = (RNG.normal(size=(1, 3, 40)) * 3).astype(np.float32)
    numbers = {"a_scale": 1.0, "a_zero": 0, "out_scale": 0.043, "out_zero": 9}
    stored = _one(numbers, x, dtype)
    assert stored.min() == (-128 if dtype == "int8" else 0)
    assert stored.max() > 100
    back = {"a_scale": 0.043, "a_zero": 9}
    np.testing.assert_array_equal(_one(back, stored, "float32"), (stored.astype(np.float32) - 9) * np.float32(0.043))


def _one(numbers: dict, a: np.ndarray, out: str) -> np.ndarray:
    """Return what is converted, the same by both."""
    options = contract_of("pointwise").options({"op": "convert", "out": out})
    wanted = reference_of("pointwise").reference({"a": a, **numbers}, options)["out"]
    (found,) = REFERENCES["pointwise"]({**_torch({"a": a, **numbers}), **options})
    np.testing.assert_array_equal(found.numpy(), wanted)
    return wanted


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_blocks_are_the_kernels_reference(bits: int, zeros: bool) -> None:
    from qcompiler.kernels.int4_matmul.reference import from_blocks

    half = 1 << (bits - 1)
    numbers = RNG.integers(-half, half, (96, 10)).astype(np.int8)
    points = RNG.integers(-half, half, (3, 10)).astype(np.int8) if zeros else None
    given = from_blocks(numbers, RNG.uniform(0.01, 0.1, (3, 10)).astype(np.float32), points, 32, bits)
    given["a"] = RNG.normal(size=(6, 96)).astype(np.float16)
    options = {"bits": str(bits), "block": "32", "zeros": "block" if zeros else "none", "out": "float32"}
    wanted = reference_of("int4_matmul").reference(given, contract_of("int4_matmul").options(options))["out"]
    (found,) = REFERENCES["int4_matmul"]({**options, **_torch(given)})
    # Sums of 96 products in float32 here, in float64 there.
    np.testing.assert_allclose(found.numpy(), wanted, atol=96 * 2.0**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("include", [0, 1])
def test_average_pool_is_the_truth(include: int) -> None:
    x, px, py = _int8(2, 4, 7, 6), _params(0.04, 11), _params(0.03, -2)
    geometry = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    window = resolve_window((3, 3), (7, 6), strides=(2, 2), pads=(1, 1, 1, 1))
    wanted = truth.qlinear_average_pool(truth.Quantized(x, px), py, window, bool(include))
    numbers = {"x_scale": 0.04, "x_zero": 11, "out_scale": 0.03, "out_zero": -2, "count_include_pad": include}
    given = {"x": x.transpose(0, 2, 3, 1), "op": "average", "layout": "NHWC", **geometry, **numbers}
    (found,) = REFERENCES["int8_pool"](_torch(given))
    np.testing.assert_array_equal(found.numpy().transpose(0, 3, 1, 2), wanted)


@pytest.mark.parametrize(("scale", "count"), [(0.04, 64), (0.031, 49)])
def test_an_average_as_a_convolution_is_that_of_onnx_runtimes_integers(scale: float, count: int) -> None:
    side = int(count**0.5)
    x = _int8(3, side, side, 40)
    given = {
        "x": x, "w_rso": np.ones((side, side, 40), np.int8), "kind": "depthwise", "out": "int8", "out_zero": -2,
        "multiplier": np.full(40, np.float32(np.float64(np.float32(scale)) / (np.float64(np.float32(0.04)) * count))),
        "offset": np.full(40, -11 * count, np.int32),
        **{f"pad_{s}": 0 for s in ("top", "left", "bottom", "right")},
        **{f"{n}_{d}": 1 for n in ("stride", "dilation") for d in "hw"},
    }  # fmt: skip
    (found,) = REFERENCES["int8_conv"](_torch(given))
    px, py = np.float32(scale), np.float32(0.04)
    # It takes uint8 only: the same numbers, with zero points that are greater by 128.
    inputs = [(x.astype(np.int16) + 128).astype(np.uint8), px, np.uint8(139), py, np.uint8(126)]
    attributes = {"channels_last": 1}
    (wanted,) = run_operator("QLinearGlobalAveragePool", inputs, domain="com.microsoft", attributes=attributes)
    np.testing.assert_array_equal(found.numpy().astype(int) + 128, wanted)


def test_lookup_covers_all_integers() -> None:
    x = np.arange(-128, 128).astype(np.int8)
    table = RNG.permutation(256).astype(np.uint8).view(np.int8)
    (found,) = REFERENCES["pointwise"]({**_torch({"x": x, "table": table}), "op": "table"})
    np.testing.assert_array_equal(found.numpy(), table)


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
def test_norm_quantize_is_the_kernels_reference(norm: str) -> None:
    x = RNG.normal(size=(6, 48)).astype(np.float32)
    given = {"x": x, "scale": 0.03, "zero": -7}
    options = {"norm": norm, "scale": "static", "out": "int8"}
    if norm != "none":
        given |= {"gamma": RNG.normal(1, 0.1, 48).astype(np.float32), "eps": 1e-5}
    wanted = reference_of("norm_quantize").reference(given, contract_of("norm_quantize").options(options))["out"]
    found, _, _ = REFERENCES["norm_quantize"](_torch({**given, **options, "scale_number": 0.03}))
    steps = np.abs(found.numpy().astype(int) - wanted)
    # Sums of the norm are float32 here and float64 there: a tie may fall the other way.
    assert steps.max() <= (0 if norm == "none" else 1)
    assert steps.mean() <= 0.01

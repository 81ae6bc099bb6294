from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS, PIECEWISE
from qcompiler.kernels.int8_matmul.contract import CONTRACT
from qcompiler.kernels.int8_matmul.reference import (
    column_sums,
    fold_zero_point,
    pack_weight,
    reference,
    to_signed,
)
from qcompiler.quant.arithmetic import requantize
from qcompiler.quant.spec import QuantParams, QuantSpec
from tests.quant.ort_operator import run_operator

KERNEL = "int8_matmul"
TILE = config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 2})
WIDE = config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP_M": 4})
EPS = 2.0**-24
RNG = np.random.default_rng(0)


def operands(m: int, n: int, k: int, *, batch: int = 1, weights: int = 1, reach: float = 1.0) -> dict[str, Any]:
    """Return s8 operands over their whole range and a multiplier that gives results a spread of about 60 * reach."""
    rng = np.random.default_rng([m, n, k])
    a = rng.integers(-128, 128, (batch, m, k), np.int8)
    w = rng.integers(-128, 128, (weights, n, k), np.int8)
    multiplier = (rng.uniform(0.5, 2.0, n) * 60 * reach / (74 * 74 * np.sqrt(k))).astype(np.float32)
    return {"a": a, "w": w, "multiplier": multiplier}


def check(interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], tile: Config = TILE) -> np.ndarray:
    """Run the kernel; assert its bytes, and its output bit for bit."""
    run = interpreter.run_kernel(KERNEL, given, options, tile)
    interpreter.check_traffic(KERNEL, run, given, options, tile)
    want = reference(given, CONTRACT.options(options))["out"]
    got: np.ndarray = run.outputs["out"]
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (1, 1, 1), (70, 33, 147), (65, 130, 200), (3, 100, 16)])
def test_ragged_shapes(interpreter: ModuleType, m: int, n: int, k: int) -> None:
    check(interpreter, operands(m, n, k) | {"out_zero": 3}, {"out": "int8"})


@pytest.mark.interpreter
def test_bands_of_tiles_cover_every_tile_once(interpreter: ModuleType) -> None:
    small = config({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 3})
    check(interpreter, operands(70, 90, 64), {"out": "float32"}, small)


@pytest.mark.interpreter
@pytest.mark.parametrize("a_zero", [-128, 0, 127])
@pytest.mark.parametrize(("out", "zero"), [("int8", -128), ("int8", 127), ("uint8", 0), ("uint8", 255)])
def test_static_zero_points_at_both_ends(interpreter: ModuleType, a_zero: int, out: str, zero: int) -> None:
    given = operands(20, 40, 100) | {"out_zero": zero}
    given["offset"] = fold_zero_point(given["w"], a_zero, RNG.integers(-1000, 1000, 40, np.int32))
    got = check(interpreter, given, {"out": out, "offset": "channel"}, WIDE)
    exact = (given["a"].astype(int) - a_zero) @ given["w"][0].astype(int).T
    params = QuantParams(QuantSpec(out), np.ones((), np.float32), np.asarray(zero))
    bias = given["offset"] + a_zero * column_sums(given["w"][0]).astype(int)
    np.testing.assert_array_equal(got, requantize(exact + bias, given["multiplier"], params))


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "uint8", "float8e4m3fn"])
def test_saturation(interpreter: ModuleType, out: str) -> None:
    given = operands(30, 30, 80, reach=50.0) | ({} if out == "float8e4m3fn" else {"out_zero": 10})
    got = check(interpreter, given, {"out": out}).astype(np.float32)
    low, high = {"int8": (-128, 127), "uint8": (0, 255), "float8e4m3fn": (-448, 448)}[out]
    assert (got == low).mean() > 0.3
    assert (got == high).mean() > 0.3


@pytest.mark.interpreter
def test_largest_sums_are_exact(interpreter: ModuleType) -> None:
    a, w = np.full((1, 2, 4096), -128, np.int8), np.full((1, 3, 4096), -128, np.int8)
    a[0, 1] = 127
    got = check(interpreter, {"a": a, "w": w}, {"out": "int32", "multiplier": "none"}, WIDE)
    np.testing.assert_array_equal(got[0, :, 0], [4096 * 128 * 128, -4096 * 127 * 128])


@pytest.mark.interpreter
def test_ties_go_to_even(interpreter: ModuleType) -> None:
    a = np.arange(-12, 12, dtype=np.int8).reshape(1, 24, 1)
    given = {"a": a, "w": np.ones((1, 1, 1), np.int8), "multiplier": np.full(1, 0.5, np.float32), "out_zero": 1}
    got = check(interpreter, given, {"out": "int8"})
    np.testing.assert_array_equal(got.ravel(), np.rint(np.arange(-12, 12) / 2).astype(int) + 1)


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32", "int8", "uint8", "float8e4m3fn", "int32"])
def test_every_output_with_dynamic_tokens(interpreter: ModuleType, out: str) -> None:
    given = operands(37, 50, 96)
    options = {"out": out, "zeros": "token"}
    given |= {"a_zero": RNG.integers(-128, 128, (1, 37), np.int32), "column_sum": column_sums(given["w"][0])}
    if out == "int32":
        options["multiplier"] = "none"
        del given["multiplier"]
    else:
        options |= {"a_scale": "token", "bias": "channel"}
        given |= {"a_scale": RNG.uniform(0.1, 2, (1, 37)).astype(np.float32)}
        given |= {"bias": RNG.normal(0, 20, 50).astype(np.float32)}
    check(interpreter, given | ({"out_zero": 2} if out in ("int8", "uint8") else {}), options)


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a in PIECEWISE])
@pytest.mark.parametrize("out", ["int8", "float16"])
def test_piecewise_activations_are_exact(interpreter: ModuleType, activation: str, out: str) -> None:
    given = operands(20, 33, 64) | {"out_zero": -5, "low": -11.3, "high": 30.2, "out_inverse": 1.7}
    kept = {"clip": ("low", "high"), "leaky_relu": ("low",)}.get(activation, ())
    given = {n: v for n, v in given.items() if n not in ("low", "high", "out_zero") or n in kept}
    if activation == "leaky_relu":
        given["low"] = 0.1
    if out == "int8":
        given["out_zero"] = -5
    check(interpreter, given, {"activation": activation, "out": out, "out_scale": "scalar"})


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a not in PIECEWISE])
def test_curved_activations(interpreter: ModuleType, activation: str) -> None:
    given = operands(30, 40, 64, reach=0.05)
    plain = reference(given, CONTRACT.options({"out": "float32"}))["out"]
    options = {"activation": activation, "out": "float32"}
    run = interpreter.run_kernel(KERNEL, given, options, TILE)
    want = reference(given, CONTRACT.options(options))["out"]
    # Some twelve roundings, each relative to a number below 1 + |x|.
    assert (np.abs(run.outputs["out"] - want) <= 12 * EPS * (1 + np.abs(plain))).all()
    # Quantized: only numbers that lie within that error of a step's edge may differ, by one.
    given |= {"out_zero": 0, "out_inverse": 25.0}
    options |= {"out": "int8", "out_scale": "scalar"}
    run = interpreter.run_kernel(KERNEL, given, options, TILE)
    steps = run.outputs["out"].astype(int) - reference(given, CONTRACT.options(options))["out"]
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() <= 0.001


@pytest.mark.interpreter
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16", "float32"])
def test_residuals(interpreter: ModuleType, place: str, dtype: str) -> None:
    given = operands(20, 40, 64) | {"residual_scale": 1.0, "residual_zero": 0, "out_zero": 7}
    if dtype == "int8":
        given |= {"residual": RNG.integers(-128, 128, (1, 20, 40), np.int8), "residual_scale": 0.37}
        given["residual_zero"] = -128
    else:
        numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        given["residual"] = RNG.normal(0, 30, (1, 20, 40)).astype(numpy_type)
    check(interpreter, given, {"residual": place, "activation": "relu", "out": "int8"})


@pytest.mark.interpreter
def test_dynamic_parameters_of_the_tensor_and_half_bias(interpreter: ModuleType) -> None:
    given = operands(20, 40, 64) | {"a_scale_one": np.array(0.3, np.float32), "a_zero_one": np.array(-77, np.int32)}
    given |= {"column_sum": column_sums(given["w"][0]), "bias": RNG.normal(0, 3, 40).astype(np.float16)}
    check(interpreter, given, {"a_scale": "tensor", "zeros": "tensor", "bias": "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("weights", [1, 3])
@pytest.mark.parametrize("points", [(-128, 127), (127, -128), (5, 0)])
def test_products_of_activations(interpreter: ModuleType, layout: str, weights: int, points: tuple[int, int]) -> None:
    given = operands(20, 33, 70, batch=3, weights=weights)
    del given["multiplier"]
    given |= {"scale": 3e-4, "a_point": points[0], "w_point": points[1]}
    if layout == "kn":
        given["w_kn"] = np.ascontiguousarray(given.pop("w").swapaxes(1, 2))
    options = {"w_layout": layout, "multiplier": "scalar", "zeros": "kernel", "out": "float32"}
    check(interpreter, given, options)
    w = given["w_kn"].swapaxes(1, 2) if layout == "kn" else given["w"]
    exact = (given["a"].astype(int) - points[0]) @ (w.astype(int) - points[1]).swapaxes(1, 2)
    want = reference(given, CONTRACT.options(options))["out"]
    np.testing.assert_array_equal(want, exact.astype(np.float32) * np.float32(3e-4))


def heads(rows: int, columns: int, depth: int, layout: str, groups: int = 2, count: int = 3) -> dict[str, Any]:
    """Return operands of an attention as models hold them: heads side by side in the row of a token, then as views."""
    rng = np.random.default_rng([rows, columns, depth])
    a = rng.integers(-128, 128, (groups, rows, count, depth), np.int8).transpose(0, 2, 1, 3)
    inner = (columns, depth) if layout == "nk" else (depth, columns)
    w = rng.integers(-128, 128, (groups, inner[0], count, inner[1]), np.int8).transpose(0, 2, 1, 3)
    assert not a.flags.c_contiguous
    return {"a": a, "w" if layout == "nk" else "w_kn": w, "scale": 60 / (74 * 74 * np.sqrt(depth))}


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", ["nk", "kn"])
@pytest.mark.parametrize("points", [(-128, -128), (127, 127), (-128, 127), (0, 3)])
@pytest.mark.parametrize(("m", "n", "k"), [(17, 17, 32), (65, 33, 65)])
def test_heads_are_read_where_they_lie(
    interpreter: ModuleType, layout: str, points: tuple[int, int], m: int, n: int, k: int
) -> None:
    given = heads(m, n, k, layout) | {"a_point": points[0], "w_point": points[1], "out_zero": -7}
    options = {"batch": "two", "w_layout": layout, "multiplier": "scalar", "zeros": "kernel", "out": "int8"}
    got = check(interpreter, given, options)
    w = given["w_kn"] if layout == "kn" else given["w"].swapaxes(-1, -2)
    exact = (given["a"].astype(int) - points[0]) @ (w.astype(int) - points[1])
    params = QuantParams(QuantSpec("int8"), np.ones((), np.float32), np.asarray(-7))
    np.testing.assert_array_equal(got, requantize(exact, np.float32(given["scale"]), params))


@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [(1, 1), (1, 3), (2, 1)])
def test_an_operand_that_is_broadcast_over_heads_is_not_copied(
    interpreter: ModuleType, shared: tuple[int, int]
) -> None:
    given = heads(20, 20, 16, "nk") | {"a_point": -128, "w_point": 127}
    given["w"] = given["w"][: shared[0], : shared[1]]
    given["a"] = np.broadcast_to(given["a"][:, :1], given["a"].shape)  # a stride of 0
    check(interpreter, given, {"batch": "two", "multiplier": "scalar", "zeros": "kernel", "out": "float32"})


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "float16"])
def test_heads_with_an_epilogue(interpreter: ModuleType, out: str) -> None:
    given = heads(20, 24, 40, "kn") | {"a_point": 100, "w_point": -100, "bias": RNG.normal(0, 9, 24).astype(np.float32)}
    given["residual"] = RNG.normal(0, 30, (2, 20, 3, 24)).astype(np.float32).transpose(0, 2, 1, 3)
    given |= {"residual_scale": 1.0, "residual_zero": 0} | ({"out_zero": 5} if out == "int8" else {})
    options = {"batch": "two", "w_layout": "kn", "multiplier": "scalar", "zeros": "kernel", "out": out}
    check(interpreter, given, options | {"bias": "channel", "residual": "before", "activation": "relu"})


@pytest.mark.interpreter
def test_the_result_lies_as_the_next_product_reads_it(interpreter: ModuleType) -> None:
    import torch

    from qcompiler.kernels.launching import launch

    given = heads(20, 24, 33, "kn") | {"a_point": 11, "w_point": -128, "out_zero": 127}
    options = {"batch": "two", "w_layout": "kn", "multiplier": "scalar", "zeros": "kernel", "out": "int8"}
    whole = torch.full((2, 20, 3, 40), 0x55, dtype=torch.int8)
    tensors = {n: interpreter.to_torch(v) if isinstance(v, np.ndarray) else v for n, v in given.items()}
    with interpreter.interpreted():
        launch(KERNEL, {**tensors, "out": whole[..., 8:32].permute(0, 2, 1, 3)}, options, TILE)
    want = reference(given, CONTRACT.options(options))["out"]
    np.testing.assert_array_equal(whole[..., 8:32].numpy(), want.transpose(0, 2, 1, 3))
    assert (whole[..., :8] == 0x55).all()
    assert (whole[..., 32:] == 0x55).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("end", [-128, 127])
def test_products_of_activations_saturate(interpreter: ModuleType, end: int) -> None:
    given = heads(20, 24, 40, "nk") | {"a_point": end, "w_point": end, "out_zero": 10, "scale": 0.03}
    options = {"batch": "two", "multiplier": "scalar", "zeros": "kernel", "out": "int8"}
    assert (check(interpreter, given, options) == 127).all()  # both lie on one side of their zero points
    got = check(interpreter, given | {"w_point": -1 - end}, options)
    assert (got == -128).all()


@pytest.mark.interpreter
def test_rows_of_a_wider_tensor(interpreter: ModuleType) -> None:
    given = operands(20, 33, 70)
    given["a"] = np.pad(given["a"], ((0, 0), (0, 0), (3, 23)))[:, :, 3:73]
    check(interpreter, given, {"out": "float32"})


@pytest.mark.interpreter
def test_not_a_number_becomes_the_least(interpreter: ModuleType) -> None:
    given = operands(4, 5, 16) | {"bias": np.full(5, np.nan, np.float32), "out_zero": 0}
    assert (check(interpreter, given, {"bias": "channel", "out": "int8"}) == -128).all()


@pytest.mark.parametrize("kind", ["uint8", "int8"])
@pytest.mark.parametrize("zeros", [(0, 255), (255, 0), (100, 131)])
def test_reference_is_qlinear_matmul(kind: str, zeros: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    shift = 128 if kind == "uint8" else 0
    a = rng.integers(-128, 128, (30, 64)).astype(int) + shift
    w = rng.integers(-127, 128, (64, 20), np.int8)
    x_zero, y_zero = (z - 128 + shift for z in zeros)
    x_scale, y_scale = np.float32(0.037), np.float32(0.9)
    w_scale = rng.uniform(0.001, 0.02, 20).astype(np.float32)
    tensors = [a.astype(kind), x_scale, np.array(x_zero, kind), w, w_scale, np.zeros(20, np.int8), y_scale]
    [want] = run_operator("QLinearMatMul", [*tensors, np.array(y_zero, kind)])
    packed = pack_weight(w)
    given = {
        "a": to_signed(a.astype(kind))[None],
        "w": packed,
        "multiplier": x_scale * w_scale / y_scale,
        "offset": fold_zero_point(packed, x_zero - shift),
        "out_zero": y_zero,
    }
    got = reference(given, CONTRACT.options({"offset": "channel", "out": kind}))["out"][0]
    np.testing.assert_array_equal(got, want)


def test_reference_is_matmul_integer_to_float() -> None:
    rng = np.random.default_rng(2)
    a, w = rng.integers(0, 256, (30, 64), np.uint8), rng.integers(-127, 128, (64, 20), np.int8)
    a_scale, w_scale = np.float32(0.0371), rng.uniform(0.001, 0.02, 20).astype(np.float32)
    bias = rng.normal(0, 1, 20).astype(np.float32)
    inputs = [a, w, a_scale, w_scale, np.array(77, np.uint8), np.zeros(20, np.int8), bias]
    [want] = run_operator("MatMulIntegerToFloat", inputs, domain="com.microsoft")
    given = {
        "a": to_signed(a)[None],
        "w": pack_weight(w),
        "multiplier": w_scale,
        "a_scale_one": np.asarray(a_scale),
        "a_zero_one": np.array(77 - 128, np.int32),
        "column_sum": column_sums(pack_weight(w)[0]),
        "bias": bias,
    }
    options = {"a_scale": "tensor", "zeros": "tensor", "bias": "channel", "out": "float32"}
    got = reference(given, CONTRACT.options(options))["out"][0]
    # The engine may contract its product and sum: one rounding of the product less.
    assert (np.abs(got - want) <= EPS * (np.abs(want) + np.abs(got - bias))).all()


def test_packing_pads_the_reduced_axis() -> None:
    packed = pack_weight(RNG.integers(0, 256, (37, 5), np.uint8))
    assert packed.shape == (1, 5, 48)
    assert not packed[:, :, 37:].any()
    assert (
        CONTRACT.traffic(
            {"a": np.zeros((1, 3, 48), np.int8), "w": packed, "multiplier": np.ones(5, np.float32)}
            | {"out": np.zeros((1, 3, 5), np.float16)},
            CONTRACT.options({}),
        ).total
        == 3 * 48 + 5 * 48 + 4 * 5 + 2 * 15
    )


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"a": np.zeros((1, 3, 17), np.int8)}, {}, r"w must have K = 17 in \[W, N, K\]; found 16"),
        ({"a": np.zeros((1, 3, 16), np.uint8)}, {}, "a must have dtype int8; found uint8"),
        ({"a": np.zeros((3, 16), np.int8)}, {}, r"a must have axes \[B, M, K\]; found shape \(3, 16\)"),
        ({"w": np.zeros((2, 5, 16), np.int8)}, {}, "one for each of the 1 of a; found 2"),
        ({"weights": 1}, {}, "has no argument 'weights'"),
        ({"a": np.zeros((1, 3, 16), np.int8)}, {"batch": "two"}, r"a must have axes \[G, H, M, K\]; found shape"),
        ({}, {"out": "int8"}, "needs out_zero"),
        ({}, {"out": "int32"}, "expected multiplier none"),
        ({}, {"activation": "softmax"}, "activation cannot be 'softmax'; expected one of none, relu"),
        ({}, {"colour": "red"}, "has no option 'colour'"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    given = operands(3, 5, 16) | changes
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(given, CONTRACT.options(options))


def test_batches_of_two_axes_are_held_to_each_other() -> None:
    given = heads(4, 5, 16, "nk") | {"w": np.zeros((2, 2, 5, 16), np.int8), "a_point": 0, "w_point": 0}
    options = {"batch": "two", "multiplier": "scalar", "zeros": "kernel"}
    with pytest.raises(TargetError, match="w must have 1 or 2 by 1 or 3 matrices; found 2 by 2"):
        CONTRACT.check(given, CONTRACT.options(options))
    given = heads(4, 5, 16, "nk") | {"column_sum": np.zeros(5, np.int32), "a_zero_one": np.zeros((), np.int32)}
    with pytest.raises(TargetError, match="have one axis for the batch; expected batch one"):
        CONTRACT.check(given, CONTRACT.options(options | {"zeros": "tensor"}))


def test_scales_of_rows_must_be_contiguous() -> None:
    given = operands(3, 5, 16, batch=2) | {"a_scale": np.ones((2, 8), np.float32)[:, :3]}
    with pytest.raises(TargetError, match=r"a_scale must be contiguous; found strides \(8, 1\) for shape \(2, 3\)"):
        CONTRACT.check(given, CONTRACT.options({"a_scale": "token"}))


def test_sums_that_could_overflow_are_refused() -> None:
    given = {"a": np.zeros((1, 1, 65794), np.int8), "w": np.zeros((1, 1, 65794), np.int8)}
    with pytest.raises(TargetError, match="the sum fits int32 up to K = 65793; found K = 65794"):
        CONTRACT.check(given, CONTRACT.options({"out": "int32", "multiplier": "none"}))
    assert 65793 * 255 * 128 < 2**31 <= 65794 * 255 * 128
    assert 33025 * 255 * 255 < 2**31 <= 33026 * 255 * 255

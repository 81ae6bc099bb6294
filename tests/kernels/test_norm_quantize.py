from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import config
from qcompiler.kernels.norm_quantize.contract import CONTRACT
from qcompiler.kernels.norm_quantize.reference import reference

KERNEL = "norm_quantize"
TILE = config({"ROWS": 4})
EPS = 2.0**-24
"""Half a unit in the last place of float32, relative."""

HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def rows(m: int, n: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(0.3, 2, (m, n))).astype(dtype)


def normed(n: int, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"gamma": rng.normal(1, 0.2, n).astype(dtype), "eps": 1e-5}


def run(interpreter: ModuleType, given: dict[str, Any], options: dict[str, str]) -> tuple[dict, dict]:
    """Return outputs of kernel and reference; dtypes, shapes and bytes are asserted."""
    done = interpreter.run_kernel(KERNEL, given, options, TILE)
    interpreter.check_traffic(KERNEL, done, given, options, TILE)
    want = reference(given, CONTRACT.options(options))
    assert {k: (v.dtype, v.shape) for k, v in done.outputs.items()} == {k: (v.dtype, v.shape) for k, v in want.items()}
    return done.outputs, want


def equal(got: dict, want: dict) -> None:
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 33), (8, 128)])
def test_quantizing_alone_is_exact(interpreter: ModuleType, m: int, n: int, dtype: Any) -> None:
    equal(*run(interpreter, {"x": rows(m, n, dtype)}, {}))


@pytest.mark.interpreter
@pytest.mark.parametrize("zero", [-128, 0, 127])
def test_static_scale_saturates_at_both_ends(interpreter: ModuleType, zero: int) -> None:
    given = {"x": rows(5, 70), "scale": 0.003, "zero": zero}
    got, want = run(interpreter, given, {"scale": "static"})
    equal(got, want)
    assert (got["out"].min(), got["out"].max()) == (-128, 127)


@pytest.mark.interpreter
def test_static_ties_go_to_even(interpreter: ModuleType) -> None:
    x = (np.arange(-8, 8, dtype=np.float32) + 0.5).reshape(1, 16) * 0.25
    got, want = run(interpreter, {"x": x, "scale": 0.25, "zero": 1}, {"scale": "static"})
    equal(got, want)
    assert [int(v) - 1 for v in got["out"][0]] == [-8, -6, -6, -4, -4, -2, -2, 0, 0, 2, 2, 4, 4, 6, 6, 8]


@pytest.mark.interpreter
def test_rows_of_zeros_and_tiny_rows_have_a_scale(interpreter: ModuleType) -> None:
    x = rows(6, 40)
    x[1] = 0
    x[2] = 1e-42
    for options in ({}, {"zeros": "token"}, {"out": "float8e4m3fn"}):
        got, want = run(interpreter, {"x": x}, options)
        equal(got, want)
        assert got["scales"][1] == 1.0
        assert got["scales"][2] > 0


@pytest.mark.interpreter
def test_dynamic_zero_points_are_exact(interpreter: ModuleType) -> None:
    x = rows(7, 65)
    x[3], x[4] = np.abs(x[3]), -np.abs(x[4])
    got, want = run(interpreter, {"x": x}, {"zeros": "token"})
    equal(got, want)
    assert (got["zeros"][3], got["zeros"][4]) == (-128, 127)


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "float8e4m3fn"])
@pytest.mark.parametrize("group", ["32", "64", "128"])
def test_groups_are_exact(interpreter: ModuleType, out: str, group: str) -> None:
    x = rows(5, 384)
    x[2, :128] = 0
    equal(*run(interpreter, {"x": x}, {"scale": "group", "group": group, "out": out}))


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "float8e4m3fn"])
@pytest.mark.parametrize("residual", ["add", "keep"])
def test_residuals_are_exact(interpreter: ModuleType, out: str, residual: str) -> None:
    given = {"x": rows(6, 50, np.float16), "residual": rows(6, 50, np.float16, seed=1)}
    equal(*run(interpreter, given, {"residual": residual, "out": out}))


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_norms_are_within_the_error_of_their_sums(interpreter: ModuleType, norm: str, dtype: str) -> None:
    n = 200
    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    given = {"x": rows(6, n, numpy_type), "residual": rows(6, n, numpy_type, seed=3)} | normed(n, numpy_type)
    given["beta"] = rows(1, n, numpy_type, seed=4)[0]
    options = {"norm": norm, "beta": "channel", "residual": "keep", "scale": "none", "out": "float32", "also": "normed"}
    got, want = run(interpreter, given, options)
    np.testing.assert_array_equal(got["kept"], want["kept"])
    # Mean and square sum: log2(n) + 2 roundings each; then two products, a quotient, a root and a sum.
    slack = (2 * (np.log2(n) + 2) + 8) * EPS * (np.abs(want["out"]) + np.abs(given["beta"].astype(np.float32)) + 1)
    assert (np.abs(got["out"] - want["out"]) <= slack).all()
    y = want["out"]
    rounding = HALF_UNIT[dtype] * np.abs(y) * (1 + 2 * HALF_UNIT[dtype]) + slack
    assert (np.abs(got["normed"].astype(np.float32) - y) <= rounding).all()


@pytest.mark.interpreter
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_normed_rows_are_quantized_within_a_step(interpreter: ModuleType, norm: str) -> None:
    n = 130
    got, want = run(interpreter, {"x": rows(9, n)} | normed(n), {"norm": norm})
    slack = (2 * (np.log2(n) + 2) + 8) * EPS
    np.testing.assert_allclose(got["scales"], want["scales"], rtol=slack)
    steps = np.abs(got["out"].astype(int) - want["out"].astype(int))
    assert steps.max() <= 1
    # A step's edge is met only where y lies within the slack of one: 2 * 127 * slack of all numbers, here none or few.
    assert (steps != 0).mean() <= 0.001


@pytest.mark.interpreter
def test_a_row_of_one_column(interpreter: ModuleType) -> None:
    given = {"x": rows(3, 1), "gamma": np.ones(1, np.float32), "eps": 1e-5}
    equal(*run(interpreter, given, {"norm": "layer"}))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"x": rows(2, 8)}, {"out": "float16"}, "out float16 and scale token do not fit"),
        ({"x": rows(2, 8)}, {"scale": "group"}, "groups of 128 must divide a row; found 8 columns"),
        ({"x": rows(2, 8)}, {"zeros": "token", "out": "float8e4m3fn"}, "zeros token needs out int8"),
        ({"x": rows(2, 8)}, {"norm": "rms"}, r"needs gamma \(scale of the norm\); found none"),
        ({"x": rows(2, 8), "eps": 1e-5}, {}, "takes eps only with norm rms or layer; found norm none"),
        ({"x": rows(2, 8).astype(np.int32)}, {}, "x must have dtype float16 or bfloat16 or float32; found int32"),
        ({"x": np.zeros((1, 40000), np.float32)}, {}, "a row may have 32768 columns; found 40000"),
        ({"x": rows(8, 2).T}, {}, "must be contiguous along its last axis"),
    ],
)
def test_wrong_calls_are_refused(given: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(given, CONTRACT.options(options))


def test_dynamic_parameters_agree_with_onnx_runtime() -> None:
    from tests.quant.ort_operator import run_operator

    for seed in range(20):
        x = rows(1, 50, seed=seed) * 10.0 ** (seed % 5 - 2)
        q, scale, zero = run_operator("DynamicQuantizeLinear", [x], outputs=3)
        found = reference({"x": x}, CONTRACT.options({"zeros": "token"}))
        np.testing.assert_array_equal(found["scales"], scale.reshape(1))
        np.testing.assert_array_equal(found["zeros"] + 128, zero.reshape(1))
        np.testing.assert_array_equal(found["out"].astype(int) + 128, q)

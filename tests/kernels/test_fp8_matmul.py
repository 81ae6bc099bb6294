from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS
from qcompiler.kernels.fp8_matmul.contract import CONTRACT
from qcompiler.kernels.fp8_matmul.reference import reference

KERNEL = "fp8_matmul"
TILE = config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP_M": 2})
EPS = 2.0**-24
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float8e4m3fn": 2.0**-4}
"""Half a unit in the last place, relative; below the normal range it is an absolute number."""
SUBNORMAL = {"float32": 0.0, "float16": 2.0**-25, "bfloat16": 0.0, "float8e4m3fn": 2.0**-10}


def operands(m: int, n: int, k: int, *, batch: int = 1, weights: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng([m, n, k])
    a = (rng.normal(0, 30, (batch, m, k))).astype(ml_dtypes.float8_e4m3fn)
    w = (rng.normal(0, 30, (weights, n, k))).astype(ml_dtypes.float8_e4m3fn)
    return {"a": a, "w": w, "multiplier": (rng.uniform(0.5, 2, n) / (900 * np.sqrt(k))).astype(np.float32)}


def magnitude(given: dict[str, Any], options: dict[str, str]) -> np.ndarray:
    """Return the scaled sum of the magnitudes of all terms, [B, M, N]: what rounding errors of sums are relative to."""
    positive = {n: v for n, v in given.items() if n not in ("bias", "residual")}
    positive |= {n: np.abs(given[n].astype(np.float32)).astype(given[n].dtype) for n in ("a", "w")}
    kept = {n: v for n, v in options.items() if n in ("multiplier", "a_scale")}
    return np.asarray(reference(positive, CONTRACT.options(kept | {"out": "float32"}))["out"])


def check(interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], tile: Config = TILE) -> np.ndarray:
    """Run the kernel; assert its bytes, and its output within the error of its sums and of the output's rounding."""
    run = interpreter.run_kernel(KERNEL, given, options, tile)
    interpreter.check_traffic(KERNEL, run, given, options, tile)
    got: np.ndarray = run.outputs["out"]
    exact = reference(given, CONTRACT.options(options))["out"]
    assert got.dtype == exact.dtype
    want, found = exact.astype(np.float64), got.astype(np.float64)
    out = options.get("out", "bfloat16")
    depth = given["a"].shape[-1]
    # Sums: K roundings at most; a few more in the epilogue. No activation here is steeper than 1.13.
    slack = 1.13 * (depth + 16) * EPS * (magnitude(given, options) + np.abs(want) + 1) * given.get("out_inverse", 1.0)
    # Both sides round to the output's format: numbers within the slack of an edge land on two neighbours.
    bound = slack + 2 * HALF_UNIT[out] * (np.abs(want) + slack) + 2 * SUBNORMAL[out]
    assert (np.abs(found - want) <= bound).all(), (np.abs(found - want) / bound).max()
    if out != "float32":  # almost all are equal
        assert (found != want).mean() < 0.02
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 128), (1, 1, 1), (70, 33, 147), (65, 130, 256), (3, 100, 16)])
def test_ragged_shapes(interpreter: ModuleType, m: int, n: int, k: int) -> None:
    check(interpreter, operands(m, n, k), {})


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["bfloat16", "float16", "float32", "float8e4m3fn"])
@pytest.mark.parametrize("a_scale", ["none", "token", "tensor"])
def test_scales_and_outputs(interpreter: ModuleType, out: str, a_scale: str) -> None:
    given = operands(37, 50, 140)
    if a_scale == "token":
        given["a_scale"] = np.random.default_rng(0).uniform(0.1, 2, (1, 37)).astype(np.float32)
    elif a_scale == "tensor":
        given["a_scale_one"] = np.array(0.3, np.float32)
    check(interpreter, given, {"a_scale": a_scale, "out": out})


@pytest.mark.interpreter
@pytest.mark.parametrize(("m", "n", "k"), [(64, 128, 256), (37, 150, 300)])
def test_block_scales(interpreter: ModuleType, m: int, n: int, k: int) -> None:
    given = operands(m, n, k)
    del given["multiplier"]
    rng = np.random.default_rng(0)
    given["a_blocks"] = (rng.uniform(0.5, 2, (1, m, -(-k // 128))) / 900).astype(np.float32)
    given["w_scale"] = rng.uniform(0.5, 2, (-(-n // 128), -(-k // 128))).astype(np.float32)
    check(interpreter, given, {"multiplier": "block", "a_scale": "block", "out": "float32"})


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(interpreter: ModuleType, activation: str) -> None:
    given = operands(30, 40, 64) | {"bias": np.linspace(-2, 2, 40, dtype=np.float32)}
    given |= {n: v for n, v in (("low", 0.1), ("high", 0.7)) if n in SCALARS.get(activation, ())}
    check(interpreter, given, {"activation": activation, "bias": "channel", "out": "float32"})


SCALARS = {"clip": ("low", "high"), "leaky_relu": ("low",)}


@pytest.mark.interpreter
@pytest.mark.parametrize("place", ["before", "after"])
def test_residuals(interpreter: ModuleType, place: str) -> None:
    given = operands(30, 40, 64) | {"residual_scale": 1.0, "residual_zero": 0}
    given["residual"] = np.random.default_rng(0).normal(0, 1, (1, 30, 40)).astype(np.float16)
    check(interpreter, given, {"residual": place, "activation": "relu", "out": "float32"})


@pytest.mark.interpreter
@pytest.mark.parametrize("weights", [1, 3])
def test_batches(interpreter: ModuleType, weights: int) -> None:
    given = operands(20, 33, 70, batch=3, weights=weights) | {"scale": 1e-3}
    del given["multiplier"]
    check(interpreter, given, {"multiplier": "scalar", "accumulate": "promoted", "out": "float32"})


@pytest.mark.interpreter
def test_e4m3_output_saturates(interpreter: ModuleType) -> None:
    given = operands(30, 30, 64) | {"out_inverse": 3000.0}
    got = check(interpreter, given, {"out": "float8e4m3fn", "out_scale": "scalar"}).astype(np.float32)
    assert (got.min(), got.max()) == (-448, 448)
    assert (np.abs(got) == 448).mean() > 0.5


@pytest.mark.interpreter
def test_not_a_number_stays_in_its_row(interpreter: ModuleType) -> None:
    given = operands(5, 6, 32)
    given["a"][0, 2, 7] = np.nan
    got = interpreter.run_kernel(KERNEL, given, {"out": "float32"}, TILE).outputs["out"]
    np.testing.assert_array_equal(np.isnan(got).any(-1), [[False, False, True, False, False]])
    assert np.isnan(got[0, 2]).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"a_scale": "block"}, "block scales are on both sides or on none"),
        ({"a": np.zeros((1, 3, 16), np.int8)}, {}, "a must have dtype float8e4m3fn; found int8"),
        ({}, {"a_scale": "token"}, r"needs a_scale \(dynamic scales\); found none"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    given = operands(3, 5, 16) | changes
    if options.get("a_scale") == "block":
        given["a_blocks"] = np.ones((1, 3, 1), np.float32)
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(given, CONTRACT.options(options))

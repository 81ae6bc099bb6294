from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS
from qcompiler.kernels.float_matmul.contract import CONTRACT
from qcompiler.kernels.float_matmul.reference import reference

KERNEL = "float_matmul"
TILE = config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2})
EPS = 2.0**-24
UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""A unit in the last place of the output, relative."""
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SCALARS = {"clip": {"low": 0.1, "high": 0.7}, "leaky_relu": {"low": 0.1}}


def operands(m: int, n: int, k: int, *, batch: int = 1, weights: int = 1, dtype: str = "float32") -> dict[str, Any]:
    rng = np.random.default_rng([m, n, k])
    a, w = rng.normal(0, 1, (batch, m, k)), rng.normal(0, 1, (weights, n, k))
    return {"a": a.astype(DTYPES[dtype]), "w": w.astype(DTYPES[dtype])}


def slack_of(given: dict[str, Any], options: dict[str, str]) -> np.ndarray:
    """Return the error of float32 sums, which the interpreter takes of operands that are not rounded."""
    positive = {n: np.abs(given[n].astype(np.float64)) for n in ("a", "w", "w_kn") if n in given}
    w = positive["w"].swapaxes(-1, -2) if "w" in positive else positive["w_kn"]
    terms = np.matmul(positive["a"], w) * abs(given.get("scale", 1.0))
    return np.asarray((given["a"].shape[-1] + 16) * EPS * (terms + 1))


def check(interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], tile: Config = TILE) -> np.ndarray:
    """Run the kernel; assert its bytes, and its output within the error of its sums and of the output's rounding."""
    run = interpreter.run_kernel(KERNEL, given, options, tile)
    interpreter.check_traffic(KERNEL, run, given, options, tile)
    got: np.ndarray = run.outputs["out"]
    exact = reference(given, CONTRACT.options(options))["out"]
    assert got.dtype == exact.dtype
    assert got.shape == exact.shape
    want, found = exact.astype(np.float64), got.astype(np.float64)
    out = options.get("out", "float32")
    slack = 1.13 * slack_of(given, options) * given.get("out_inverse", 1.0)  # no activation here is steeper
    if out in UNIT:
        bound = slack + UNIT[out] * (np.abs(want) + slack)
        assert (np.abs(found - want) <= bound).all(), (np.abs(found - want) / bound).max()
    else:  # a sum beside the edge between two numbers falls on either side
        assert np.abs(found - want).max() <= 1
        assert (found != want).mean() < 1e-3
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("m", "n", "k"), [(64, 64, 32), (1, 1, 1), (70, 33, 8), (65, 130, 47), (3, 100, 16), (130, 7, 100)]
)
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_ragged_shapes(interpreter: ModuleType, layout: str, m: int, n: int, k: int) -> None:
    given = operands(m, n, k)
    if layout == "kn":
        given["w_kn"] = np.ascontiguousarray(given.pop("w").swapaxes(-1, -2))
    check(interpreter, given, {"w_layout": layout})


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_dtypes(interpreter: ModuleType, dtype: str, out: str) -> None:
    check(interpreter, operands(37, 50, 40, dtype=dtype), {"out": out})


@pytest.mark.interpreter
def test_the_factor_of_scores(interpreter: ModuleType) -> None:
    check(interpreter, operands(30, 40, 8) | {"scale": 0.125}, {"factor": "scalar"})


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(interpreter: ModuleType, activation: str) -> None:
    given = operands(30, 40, 24) | {"bias": np.linspace(-2, 2, 40, dtype=np.float32)} | SCALARS.get(activation, {})
    check(interpreter, given, {"activation": activation, "bias": "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize("place", ["before", "after"])
def test_residuals(interpreter: ModuleType, place: str) -> None:
    given = operands(30, 40, 24) | {"residual_scale": 0.5, "residual_zero": -3}
    given["residual"] = np.random.default_rng(0).integers(-128, 128, (1, 30, 40)).astype(np.int8)
    check(interpreter, given, {"residual": place, "activation": "relu"})


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "uint8"])
@pytest.mark.parametrize("zero", [-128, 0, 127])
def test_quantized_outputs_saturate_at_both_ends(interpreter: ModuleType, out: str, zero: int) -> None:
    point = zero + (128 if out == "uint8" else 0)
    given = operands(60, 70, 33) | {"out_inverse": 20.0, "out_zero": point}
    got = check(interpreter, given, {"out": out, "out_scale": "scalar"})
    ends = np.iinfo(got.dtype)
    assert {got.min(), got.max()} == {ends.min, ends.max}


@pytest.mark.interpreter
@pytest.mark.parametrize("weights", [1, 3])
def test_batches(interpreter: ModuleType, weights: int) -> None:
    check(interpreter, operands(20, 33, 70, batch=3, weights=weights), {})


@pytest.mark.interpreter
@pytest.mark.parametrize("shared", [False, True])
def test_heads_are_read_where_they_lie(interpreter: ModuleType, shared: bool) -> None:
    rng = np.random.default_rng(1)
    groups, heads, tokens, size = 2, 3, 19, 8
    a = rng.normal(size=(groups, tokens, heads, size)).astype(np.float32).transpose(0, 2, 1, 3)
    w = rng.normal(size=(groups, tokens, 1 if shared else heads, size)).astype(np.float32).transpose(0, 2, 1, 3)
    check(interpreter, {"a": a, "w": w, "scale": 0.3}, {"batch": "two", "factor": "scalar"})


@pytest.mark.interpreter
def test_not_a_number_stays_in_its_row(interpreter: ModuleType) -> None:
    given = operands(5, 6, 20)
    given["a"][0, 2, 7] = np.nan
    got = interpreter.run_kernel(KERNEL, given, {}, TILE).outputs["out"]
    np.testing.assert_array_equal(np.isnan(got).any(-1), [[False, False, True, False, False]])
    assert np.isnan(got[0, 2]).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"a": np.zeros((1, 3, 16), np.int8)}, {}, "a must have dtype float32 or float16 or bfloat16; found int8"),
        ({"w": np.zeros((1, 5, 16), np.float16)}, {}, "w must have dtype float32; found float16"),
        ({"w": np.zeros((2, 5, 16), np.float32)}, {}, "w must have one matrix, or one for each of the 1 of a; found 2"),
        ({}, {"factor": "scalar"}, r"needs scale \(factor of the sum\); found none"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(operands(3, 5, 16) | changes, CONTRACT.options(options))


@pytest.mark.aot
@pytest.mark.parametrize(("arch", "text"), [("sm80", "mma.sync.aligned.m16n8k8"), ("sm90", "wgmma.mma_async")])
def test_float32_is_multiplied_in_tf32(arch: str, text: str) -> None:
    from qcompiler.kernels.catalog import implementation_of
    from qcompiler.kernels.config import load_table
    from qcompiler.kernels.proof.compiling import compile_for

    dims = {"B": 1, "M": 512, "N": 512, "K": 512, "W": 1}
    options = CONTRACT.options({})
    tensors = {**CONTRACT.operands(dims, options, {}), **CONTRACT.example_scalars(options)}
    tile = load_table(KERNEL).choose(arch, dims, options)
    [call] = implementation_of(KERNEL).calls(tensors, options, tile)
    found = compile_for(call, arch)
    assert text in found.ptx
    assert "tf32.tf32" in found.ptx
    assert found.faults() == []

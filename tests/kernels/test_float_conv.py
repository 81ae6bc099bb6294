from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS
from qcompiler.kernels.float_conv.contract import CONTRACT
from qcompiler.kernels.float_conv.reference import reference
from qcompiler.kernels.int8_conv.contract import GEOMETRY
from tests.quant.ort_operator import run_operator

KERNEL = "float_conv"
TILE = config({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2})
EPS = 2.0**-24
UNIT = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""A unit in the last place of the output, relative."""
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PLAIN: dict[str, int] = dict(GEOMETRY)
SAME: dict[str, int] = PLAIN | {"pad_top": 1, "pad_left": 1, "pad_bottom": 1, "pad_right": 1}
SCALARS = {"clip": {"low": 0.1, "high": 0.7}, "leaky_relu": {"low": 0.1}}


def operands(x: tuple[int, ...], w: tuple[int, ...], *, dtype: str = "float32", **geometry: int) -> dict[str, Any]:
    """Return x in NHWC and w in [O, R, S, C/g]; three axes make depthwise weights."""
    rng = np.random.default_rng([*x, *w])
    weight = rng.normal(0, 1, w).astype(DTYPES[dtype])
    groups = {"group": 1} if len(w) == 4 else {}
    given = {"x": rng.normal(0, 1, x).astype(DTYPES[dtype]), "w_rso" if len(w) == 3 else "w": weight}
    return given | SAME | groups | geometry


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
    weights = given["w_rso"] if "w_rso" in given else given["w"]
    positive = {n: np.abs(v.astype(np.float32)) if n in ("x", "w", "w_rso") else v for n, v in given.items()}
    kept = {n: v for n, v in options.items() if n in ("kind", "pad")}
    terms = reference({n: v for n, v in positive.items() if n not in ("bias", "residual")}, CONTRACT.options(kept))
    depth = weights[..., 0].size if "w_rso" in given else weights[0].size
    # No activation here is steeper than 1.13.
    slack = 1.13 * (depth + 16) * EPS * (terms["out"].astype(np.float64) + 1) * given.get("out_inverse", 1.0)
    if out in UNIT:
        bound = slack + UNIT[out] * (np.abs(want) + slack)
        assert (np.abs(found - want) <= bound).all(), (np.abs(found - want) / bound).max()
    else:  # a sum beside the edge between two numbers falls on either side
        assert np.abs(found - want).max() <= 1
        assert (found != want).mean() < 1e-3
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("x", "w"),
    [
        ((1, 8, 8, 32), (32, 3, 3, 32)),  # every step in one tap
        ((2, 9, 6, 16), (33, 3, 3, 16)),  # steps over taps
        ((1, 11, 9, 3), (20, 7, 7, 3)),  # first layer
        ((3, 5, 4, 13), (7, 2, 3, 13)),
        ((1, 1, 1, 1), (1, 1, 1, 1)),
        ((2, 1, 37, 10), (12, 1, 5, 10)),  # one dimension
    ],
)
def test_ragged_shapes(interpreter: ModuleType, x: tuple[int, ...], w: tuple[int, ...]) -> None:
    check(interpreter, operands(x, w), {})


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "geometry",
    [
        {"stride_h": 2, "stride_w": 2},
        {"dilation_h": 2, "dilation_w": 3, "pad_left": 4},
        {"pad_top": 5, "pad_bottom": 4, "pad_left": 0, "pad_right": 6},  # windows that lie outside as a whole
    ],
)
@pytest.mark.parametrize("channels", [32, 5])
def test_geometry(interpreter: ModuleType, geometry: dict[str, int], channels: int) -> None:
    check(interpreter, operands((2, 8, 9, channels), (17, 3, 3, channels), **geometry), {})


@pytest.mark.interpreter
def test_pictures_that_are_not_padded(interpreter: ModuleType) -> None:
    check(interpreter, operands((2, 6, 7, 32), (20, 3, 3, 32)) | PLAIN, {"pad": "none"})


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "group", "columns"), [(64, 2, 34), (12, 3, 9), (8, 8, 16)])
def test_groups(interpreter: ModuleType, channels: int, group: int, columns: int) -> None:
    given = operands((2, 5, 6, channels), (columns, 3, 3, channels // group), group=group)
    bias = np.random.default_rng(0).normal(0, 1, columns).astype(np.float32)
    check(interpreter, given | {"bias": bias}, {"bias": "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize(("channels", "repeat"), [(40, 1), (20, 2)])
@pytest.mark.parametrize("pad", ["zero", "none"])
def test_depthwise(interpreter: ModuleType, channels: int, repeat: int, pad: str) -> None:
    given = operands((2, 9, 6, channels), (3, 3, channels * repeat), stride_h=2, dilation_w=2)
    given |= {n: 0 for n in PLAIN if n.startswith("pad") and pad == "none"}
    check(interpreter, given, {"kind": "depthwise", "pad": pad})


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_dtypes(interpreter: ModuleType, dtype: str, out: str) -> None:
    check(interpreter, operands((1, 5, 6, 20), (30, 3, 3, 20), dtype=dtype), {"out": out})


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(interpreter: ModuleType, activation: str) -> None:
    given = operands((1, 5, 6, 12), (20, 3, 3, 12)) | SCALARS.get(activation, {})
    given |= {"bias": np.linspace(-2, 2, 20, dtype=np.float32)}
    check(interpreter, given, {"activation": activation, "bias": "channel"})


@pytest.mark.interpreter
@pytest.mark.parametrize("place", ["before", "after"])
def test_residuals(interpreter: ModuleType, place: str) -> None:
    given = operands((2, 5, 6, 12), (20, 3, 3, 12)) | {"residual_scale": 0.5, "residual_zero": -3}
    given["residual"] = np.random.default_rng(0).integers(-128, 128, (2, 5, 6, 20)).astype(np.int8)
    check(interpreter, given, {"residual": place, "activation": "relu"})


@pytest.mark.interpreter
@pytest.mark.parametrize("out", ["int8", "uint8"])
@pytest.mark.parametrize("zero", [-128, 127])
def test_quantized_outputs_saturate_at_both_ends(interpreter: ModuleType, out: str, zero: int) -> None:
    point = zero + (128 if out == "uint8" else 0)
    given = operands((2, 9, 9, 12), (30, 3, 3, 12)) | {"out_inverse": 20.0, "out_zero": point}
    got = check(interpreter, given, {"out": out, "out_scale": "scalar"})
    ends = np.iinfo(got.dtype)
    assert {got.min(), got.max()} == {ends.min, ends.max}


def test_the_reference_is_onnx_runtimes_convolution() -> None:
    given = operands((2, 7, 6, 12), (9, 3, 2, 4), group=3, stride_h=2, dilation_w=2)
    [want] = run_operator(
        "Conv", [given["x"].transpose(0, 3, 1, 2), given["w"].transpose(0, 3, 1, 2)],
        attributes={"group": 3, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 1, 1, 1]},
    )  # fmt: skip
    got = reference(given, CONTRACT.options({}))["out"].transpose(0, 3, 1, 2)
    np.testing.assert_allclose(got, want, atol=24 * EPS * 30)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"x": np.zeros((1, 4, 4, 6), np.int8)}, {}, "x must have dtype float32 or float16 or bfloat16; found int8"),
        ({"group": 4}, {}, "4 groups must divide C = 6 and O = 8"),
        ({}, {"pad": "none"}, "pad none is for pictures without padding; found 1 and 1"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(operands((1, 4, 4, 6), (8, 3, 3, 6)) | changes, CONTRACT.options(options))

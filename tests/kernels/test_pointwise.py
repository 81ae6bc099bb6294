from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy.special import erf

from qcompiler.errors import TargetError
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS, PIECEWISE
from qcompiler.kernels.pointwise.contract import CONTRACT, collapse, tile_call
from qcompiler.kernels.pointwise.reference import make_table, reference
from tests.quant.ort_operator import run_operator

KERNEL = "pointwise"
TILE = config({"BLOCK": 256})
EPS = 2.0**-24
RNG = np.random.default_rng(0)


def numbers(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers over the whole range of an 8-bit dtype, or floats with a spread of 50."""
    if dtype in ("int8", "uint8"):
        info = np.iinfo(dtype)
        return RNG.integers(info.min, info.max + 1, shape, dtype)
    return RNG.normal(0, 50, shape).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def operands(
    a: tuple[int, ...], *others: tuple[int, ...], dtype: str = "int8", out: tuple[float, int] | None = (0.93, 7)
) -> dict[str, Any]:
    """Return operands a, b, c of one dtype with scales and zero points of their own."""
    given: dict[str, Any] = {} if out is None else {"out_scale": out[0], "out_zero": out[1]}
    quantized = dtype in ("int8", "uint8")
    for name, shape in zip("abc", (a, *others), strict=False):
        given[name] = numbers(dtype, shape)
        given[f"{name}_scale"] = {"a": 0.71, "b": 0.37, "c": 0.053}[name] if quantized else 1.0
        given[f"{name}_zero"] = {"a": -5, "b": 19, "c": 3}[name] if quantized else 0
    return given


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
@pytest.mark.parametrize("arithmetic", ["float32", "fast", "float64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_operations(interpreter: ModuleType, op: str, arithmetic: str) -> None:
    given = operands((1, 20, 50), (1, 20, 50), out=(30.0 if op == "mul" else 0.93, 7))
    check(interpreter, given, {"op": op, "arithmetic": arithmetic})


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 1, 300), (2, 33, 40)])
@pytest.mark.parametrize("axes", ["PMN", "N", "M", "PM", "PN", "P", "MN", ""])
def test_broadcasting(interpreter: ModuleType, shape: tuple[int, int, int], axes: str) -> None:
    other = tuple(n if axis in axes else 1 for axis, n in zip("PMN", shape, strict=True))
    check(interpreter, operands(shape, other), {"op": "add"}, config({"BLOCK": 128}))


@pytest.mark.interpreter
@pytest.mark.parametrize(("b", "c"), [((2, 9, 30), (1, 1, 30)), ((1, 9, 1), (2, 1, 1)), ((1, 1, 1), (2, 9, 30))])
@pytest.mark.parametrize("third", ["add", "mul"])
def test_three_operands(interpreter: ModuleType, b: tuple[int, ...], c: tuple[int, ...], third: str) -> None:
    check(interpreter, operands((2, 9, 30), b, c), {"op": "mul", "third": third})


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["int8", "uint8", "float16", "bfloat16", "float32"])
@pytest.mark.parametrize("out", ["int8", "uint8", "float16", "bfloat16", "float32"])
def test_conversions(interpreter: ModuleType, dtype: str, out: str) -> None:
    given = operands((1, 3, 100), dtype=dtype, out=(0.93, 7) if out in ("int8", "uint8") else None)
    check(interpreter, given, {"op": "convert", "out": out})


@pytest.mark.interpreter
@pytest.mark.parametrize("arithmetic", ["float32", "fast", "float64"])
@pytest.mark.parametrize(("out", "zero"), [("int8", -128), ("int8", 127), ("uint8", 0), ("uint8", 255)])
def test_zero_points_at_both_ends_and_saturation(interpreter: ModuleType, out: str, zero: int, arithmetic: str) -> None:
    given = operands((1, 2, 256), (1, 2, 256), out=(0.05, zero)) | {"a_zero": 127, "b_zero": -128}
    got = check(interpreter, given, {"op": "add", "out": out, "arithmetic": arithmetic})
    info = np.iinfo(out)
    assert {info.min, info.max} == {int(got.min()), int(got.max())}


@pytest.mark.interpreter
@pytest.mark.parametrize("arithmetic", ["float32", "fast", "float64"])
def test_ties_go_to_even(interpreter: ModuleType, arithmetic: str) -> None:
    given = {"a": np.arange(-12, 12, dtype=np.int8).reshape(1, 1, 24), "a_scale": 0.25, "a_zero": 0}
    got = check(interpreter, given | {"out_scale": 0.5, "out_zero": 1}, {"op": "convert", "arithmetic": arithmetic})
    np.testing.assert_array_equal(got.ravel(), np.rint(np.arange(-12, 12) / 2).astype(int) + 1)


@pytest.mark.interpreter
def test_special_floats_are_quantized(interpreter: ModuleType) -> None:
    values = np.array([[[np.nan, np.inf, -np.inf, 1e38, -0.0, 1e-45]]], np.float32)
    given = {"a": values, "a_scale": 1.0, "a_zero": 0, "out_scale": 0.001, "out_zero": -3}
    got = check(interpreter, given, {"op": "convert"})
    np.testing.assert_array_equal(got.ravel(), [-128, 127, -128, 127, -3, -3])


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(interpreter: ModuleType, activation: str) -> None:
    given = operands((1, 3, 100), dtype="float32", out=None) | {"a": numbers("float32", (1, 3, 100)) / 20}
    given |= {"low": -0.5} if activation in ("clip", "leaky_relu") else {}
    given |= {"high": 1.75} if activation == "clip" else {}
    options = {"op": "convert", "activation": activation, "out": "float32"}
    if activation in PIECEWISE:
        check(interpreter, given, options)
        wide = given | {"out_scale": 0.03, "out_zero": -1}
        check(interpreter, wide, {"op": "convert", "activation": activation, "arithmetic": "float64"})
        return
    got = interpreter.run_kernel(KERNEL, given, options, TILE).outputs["out"]
    want = reference(given, CONTRACT.options(options))["out"]
    # Sums of a few float32 operations on numbers up to 10.
    np.testing.assert_allclose(got, want, rtol=16 * EPS, atol=64 * EPS)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("out", ["int8", "uint8", "float16", "bfloat16", "float32"])
def test_tables(interpreter: ModuleType, dtype: str, out: str) -> None:
    x = np.concatenate([np.arange(256, dtype=np.uint8).view(dtype), numbers(dtype, (45,))]).reshape(1, 7, 43)
    quantized = out in ("int8", "uint8")
    table = make_table(lambda v: v / (1 + np.exp(-v)), (dtype, 0.07, 3), (out, 0.05 if quantized else 1.0, 0))
    given = {"x": x, "table": table} | ({"out_scale": 1.0, "out_zero": 0} if quantized else {})
    check(interpreter, given, {"op": "table", "out": out})


@pytest.mark.interpreter
def test_gaps_are_refused(interpreter: ModuleType) -> None:
    given = operands((1, 4, 20), (1, 4, 20))
    given["b"] = numbers("int8", (1, 4, 30))[:, :, :20]
    with pytest.raises(TargetError, match=r"b must have no gaps; found strides \(120, 30, 1\)"):
        interpreter.run_kernel(KERNEL, given, {"op": "add"}, TILE)


def onnx_number(value: float, dtype: str = "float32") -> np.ndarray:
    return np.array(value, dtype)


def distances_to_ties(given: dict[str, Any], op: str) -> np.ndarray:
    """Return how far exact results are from the nearest tie, in float32 roundings of the numbers they are made of."""
    a, b = ((given[n].astype(np.float64) - given[f"{n}_zero"]) * float(np.float32(given[f"{n}_scale"])) for n in "ab")
    scale = float(np.float32(given["out_scale"]))
    exact = {"Add": a + b, "Sub": a - b, "Mul": a * b}[op] / scale
    size = (np.abs(a * b) if op == "Mul" else np.abs(a) + np.abs(b)) / scale + 256
    distances: np.ndarray = np.abs(exact - np.floor(exact) - 0.5) / (size * EPS)
    return distances


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
def test_reference_is_dequantize_operate_quantize(op: str, kind: str) -> None:
    given = operands((1, 300, 300), (1, 300, 300), dtype=kind, out=(3.7193 if op == "Mul" else 0.54321, 9))
    given |= {"a_zero": 11, "b_zero": 77}
    real = []
    for name in "ab":
        scale, zero = onnx_number(given[f"{name}_scale"]), onnx_number(given[f"{name}_zero"], kind)
        real += run_operator("DequantizeLinear", [given[name], scale, zero])
    [combined] = run_operator(op, real)
    quantized = [combined, onnx_number(given["out_scale"]), onnx_number(9, kind)]
    [want] = run_operator("QuantizeLinear", quantized)
    got = reference(given, CONTRACT.options({"op": op.lower(), "out": kind}))["out"]
    np.testing.assert_array_equal(got, want)
    for arithmetic in ("fast", "float64"):
        other = reference(given, CONTRACT.options({"op": op.lower(), "out": kind, "arithmetic": arithmetic}))["out"]
        assert np.abs(other.astype(int) - want).max() <= 1
        assert distances_to_ties(given, op)[other != want].max(initial=0) <= 4


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize("out_zero", [8, 9])
def test_reference_against_qlinear(op: str, kind: str, out_zero: int) -> None:
    """The engine rounds behind the zero point: ties, and what lies very near to one, may differ by a step."""
    scales = (0.5, 0.25, 1.0 if op == "Add" else 4.0)  # every second sum or so is a tie
    for a_scale, b_scale, out_scale in (scales, (0.713, 0.3711, 0.93 if op == "Add" else 31.0)):
        given = operands((1, 256, 256), (1, 256, 256), dtype=kind, out=(out_scale, out_zero))
        given |= {"a_scale": a_scale, "b_scale": b_scale, "a_zero": 11, "b_zero": 77}
        tensors = [given["a"], onnx_number(a_scale), onnx_number(11, kind)]
        tensors += [given["b"], onnx_number(b_scale), onnx_number(77, kind)]
        tensors += [onnx_number(out_scale), onnx_number(out_zero, kind)]
        [want] = run_operator(f"QLinear{op}", tensors, domain="com.microsoft")
        got = reference(given, CONTRACT.options({"op": op.lower(), "out": kind}))["out"]
        differing = got != want
        assert np.abs(got.astype(int) - want).max() <= 1
        assert distances_to_ties(given, op)[differing].max(initial=0) <= 8
        if a_scale == 0.5:
            assert differing.any() == bool(out_zero % 2)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_reference_quantizes_and_dequantizes_as_onnx(kind: str) -> None:
    values = np.concatenate([RNG.normal(0, 60, 5000), np.arange(-300, 300) * 0.2715]).astype(np.float32)
    parameters = [onnx_number(0.543), onnx_number(13, kind)]
    [want] = run_operator("QuantizeLinear", [values, *parameters])
    given = {"a": values[None, None], "a_scale": 1.0, "a_zero": 0, "out_scale": 0.543, "out_zero": 13}
    stored = reference(given, CONTRACT.options({"op": "convert", "out": kind}))["out"]
    np.testing.assert_array_equal(stored[0, 0], want)
    [back] = run_operator("DequantizeLinear", [want, *parameters])
    given = {"a": stored, "a_scale": 0.543, "a_zero": 13}
    np.testing.assert_array_equal(
        reference(given, CONTRACT.options({"op": "convert", "out": "float32"}))["out"][0, 0], back
    )


def test_tables_are_exact_functions() -> None:
    table = make_table(lambda v: 0.5 * v * (1 + erf(v / np.sqrt(2))), ("int8", 0.05, -20), ("int8", 0.04, -100))
    x = (np.arange(-128, 128) + 20) * float(np.float32(0.05))
    want = np.rint(0.5 * x * (1 + erf(x / np.sqrt(2))) / float(np.float32(0.04))) - 100
    np.testing.assert_array_equal(table, np.clip(want, -128, 127))
    assert make_table(np.tanh, ("uint8", 0.1, 128), ("float16", 1.0, 0)).dtype == np.float16


@pytest.mark.parametrize(
    ("shape", "others", "want"),
    [
        ((2, 8, 8, 16), [(2, 8, 8, 16)], ((1, 1, 2048), [(1, 1, 2048)])),
        ((2, 8, 8, 16), [(16,)], ((1, 128, 16), [(1, 1, 16)])),
        ((2, 16, 8, 8), [(1, 16, 1, 1)], ((2, 16, 64), [(1, 16, 1)])),
        ((2, 8, 8, 16), [(2, 1, 1, 16)], ((2, 64, 16), [(2, 1, 16)])),
        ((2, 8, 8, 16), [(), (2, 8, 8, 16)], ((1, 1, 2048), [(1, 1, 1), (1, 1, 2048)])),
        ((2, 8, 8, 16), [(1, 8, 1, 16)], None),
        ((1, 16), [(4, 16)], None),
        ((16,), [(4, 16)], None),
        ((), [()], ((1, 1, 1), [(1, 1, 1)])),
    ],
)
def test_axes_are_merged(shape: tuple[int, ...], others: list[tuple[int, ...]], want: Any) -> None:
    assert collapse(shape, others) == want


def test_traffic_counts_every_tensor_once() -> None:
    given = operands((2, 9, 30), (1, 1, 30)) | {"out": np.zeros((2, 9, 30), np.int8)}
    traffic = CONTRACT.traffic(given, CONTRACT.options({"op": "add"}))
    assert (traffic.read, traffic.written, traffic.macs) == (540 + 30, 540, 0)


def test_tiles_follow_the_axes() -> None:
    assert tile_call((2, 64, 16), {"b": (2, 64, 16)}, 256).shape == (1, 1, 2048)
    assert tile_call((2, 64, 16), {"b": (1, 1, 16)}, 256).block == (16, 16)
    split = tile_call((2, 64, 16), {"b": (2, 1, 16)}, 256)
    assert (split.shape, split.tiles, split.programs) == ((2, 64, 16), (4, 1), 8)
    assert (split.modes, split.steps) == ({"b": "columns"}, {"b": 16})


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"b": np.zeros((1, 2, 8), np.int8)}, {}, "b must have M = 4 or 1; found 2"),
        ({}, {"op": "convert"}, "takes b only with op add or sub or mul; found op convert"),
        ({}, {"arithmetic": "float64", "activation": "silu"}, "arithmetic float64 is for out int8 or uint8 and"),
        ({"a": np.zeros((1, 4, 8), np.int32)}, {}, "a must have dtype int8 or uint8"),
        ({"b_zero": None}, {}, "needs b_zero"),
    ],
)
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    given = {n: v for n, v in (operands((1, 4, 8), (1, 4, 8)) | changes).items() if v is not None}
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(given, CONTRACT.options(options))


@pytest.mark.aot
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_bulk_is_moved_128_bits_at_a_time(arch: str) -> None:
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for

    cases = {c.case.label: c for c in compilations(KERNEL, arch)}
    for label in ("add", "quantize", "add, float64"):
        compiled = compile_for(cases[label].calls[0], arch)
        assert set(compiled.loads) == set(compiled.stores) == {128}
    assert "div.rn.f64" in compiled.ptx
    table = compile_for(cases["table"].calls[0], arch)
    assert set(table.stores) == {128}
    assert table.loads[128] == 1

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qcompiler.errors import TargetError
from qcompiler.kernels.catalog import contract_of
from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS
from qcompiler.kernels.int4_matmul.contract import CONTRACT
from qcompiler.kernels.int4_matmul.reference import (
    NF4,
    dequantized,
    from_blocks,
    from_nbits,
    pack,
    reference,
    unpack,
)
from qcompiler.passes import matmul_nbits
from tests.quant.ort_operator import run_operator

KERNEL = "int4_matmul"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""Largest relative error of rounding to a format."""
LEAST = {"float16": 2.0**-25, "bfloat16": 0.0, "float32": 0.0}
"""Largest absolute error among subnormal numbers."""


def tile(m: int = 64, n: int = 64, k: int = 64, *, split: int = 1, swap: int = 0) -> Config:
    return config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 2, "SPLIT": split, "SWAP": swap})


def operands(m: int, n: int, k: int, options: dict[str, str], dtype: str = "float16", **kinds: str) -> dict[str, Any]:
    """Return activations and weights that use all numbers; zero points lie at both ends and between."""
    rng = np.random.default_rng([m, n, k])
    chosen = CONTRACT.options(options)
    bits, block = chosen["bits"], int(chosen["block"])
    most = 255 if bits == "8" else 15
    shape = (-(-k // block), n)
    given: dict[str, Any] = {"a": rng.normal(0, 1, (m, k)).astype(DTYPES[dtype])}
    given["w8" if bits == "8" else "w"] = pack(rng.integers(0, most + 1, (n, k), np.uint8), bits)
    scale = rng.uniform(0.5, 2, shape) * (1.0 if bits == "nf4" else 2.0 / most)
    given["scales"] = scale.astype(DTYPES[kinds.get("scales", dtype)])
    if chosen["zeros"] == "block":
        given["zeros"] = rng.choice(np.array([0, most // 3, most], np.uint8), shape)
    if bits == "nf4":
        given["codebook"] = np.asarray(NF4, np.float32)
    return given


def bound(given: dict[str, Any], options: dict[str, str], *, rounded: bool = True) -> np.ndarray:
    """Return the largest error of a float output before its epilogue, [M, N].

    Each weight is rounded to the dtype of ``a`` (not in the path without matrix units), each of K products is added in
    float32, in any order, with at most two roundings more for zero point and scale.
    """
    a, w = given["a"].astype(np.float64), dequantized(given, CONTRACT.options(options)).astype(np.float64)
    dtype = str(given["a"].dtype)
    per_weight = (ROUNDING[dtype] if rounded else 0.0) + (a.shape[1] + 3) * ROUNDING["float32"]
    least = LEAST[dtype] * np.abs(a).sum(1, keepdims=True) if rounded else 0.0
    return np.asarray(per_weight * (np.abs(a) @ np.abs(w).T) + least)


def check(
    interpreter: ModuleType, given: dict[str, Any], options: dict[str, str], cut: Config, kernel: str = KERNEL
) -> np.ndarray:
    """Run the kernel; assert its bytes, and its output within the bound of its formats."""
    run = interpreter.run_kernel(kernel, given, options, cut)
    interpreter.check_traffic(kernel, run, given, options, cut)
    chosen = contract_of(kernel).options(options)
    want = reference(given, chosen)["out"]
    got: np.ndarray = run.outputs["out"]
    assert got.dtype == want.dtype
    error = np.abs(got.astype(np.float64) - want.astype(np.float64))
    # Slopes of all activations are below 1.13; some dozen roundings of float32 for curves.
    allowed = 1.13 * bound(given, options, rounded=cut["BLOCK_M"] > 1)
    allowed += 16 * ROUNDING["float32"] * (1 + np.abs(want.astype(np.float64)))
    if chosen["out"] in ROUNDING:
        # Both sides round: numbers closer than the error may fall into neighbouring steps.
        allowed += 2 * ROUNDING[chosen["out"]] * np.abs(want.astype(np.float64)) + 2 * LEAST[chosen["out"]]
    elif chosen["out"] == "float8e4m3fn":
        allowed += np.maximum(np.abs(want.astype(np.float64)) / 8, 2.0**-9)
    else:
        allowed = np.ceil(allowed * given.get("out_inverse", 1.0))
        assert allowed.max() <= 1
        assert (error > 0).mean() <= 0.02
    assert (error <= allowed).all(), (error / allowed).max()
    return got


@pytest.mark.interpreter
@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 128), (70, 33, 147), (1, 1, 1), (16, 90, 31)])
def test_ragged_shapes(interpreter: ModuleType, m: int, n: int, k: int, swap: int) -> None:
    options = {"out": "float32", "zeros": "block"}
    check(interpreter, operands(m, n, k, options), options, tile(swap=swap))


@pytest.mark.interpreter
@pytest.mark.parametrize("swap", [0, 1])
@pytest.mark.parametrize("block", ["16", "32", "64", "128", "256"])
@pytest.mark.parametrize("bits", ["4", "8"])
def test_every_block_with_zero_points(interpreter: ModuleType, bits: str, block: str, swap: int) -> None:
    options = {"bits": bits, "block": block, "zeros": "block", "out": "float32"}
    check(interpreter, operands(16, 48, 300, options), options, tile(16, 64, 128, swap=swap))


@pytest.mark.interpreter
@pytest.mark.parametrize("block", ["16", "32", "256"])
@pytest.mark.parametrize("bits", ["4", "8", "nf4"])
def test_every_block_without_zero_points(interpreter: ModuleType, bits: str, block: str) -> None:
    options = {"bits": bits, "block": block, "out": "float32"}
    check(interpreter, operands(16, 40, 256, options), options, tile(16, 64, 64))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32", "int8", "uint8", "float8e4m3fn"])
def test_every_dtype(interpreter: ModuleType, dtype: str, out: str) -> None:
    options = {"out": out, "bias": "channel"} | ({"out_scale": "scalar"} if out in ("int8", "uint8") else {})
    given = operands(16, 40, 64, options, dtype, scales="float32")
    given["bias"] = np.random.default_rng(1).normal(0, 1, 40).astype(DTYPES[dtype])
    given |= {"out_zero": 3, "out_inverse": 0.9} if out in ("int8", "uint8") else {}
    check(interpreter, given, options, tile(16))


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(interpreter: ModuleType, activation: str) -> None:
    place = "before" if activation in ("relu", "silu", "clip") else "after"
    options = {"activation": activation, "residual": place, "out": "float32"}
    given = operands(16, 40, 64, options) | {"residual_scale": 0.37, "residual_zero": -128}
    given["residual"] = np.random.default_rng(2).integers(-128, 128, (16, 40), np.int8)
    given |= {"low": 0.1} if activation in ("clip", "leaky_relu") else {}
    given |= {"high": 3.0} if activation == "clip" else {}
    check(interpreter, given, options, tile(16))


@pytest.mark.interpreter
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("block", ["16", "32", "128"])
def test_unpacking_is_exact(interpreter: ModuleType, bits: str, block: str) -> None:
    """Rows of the unit matrix give the weights themselves: numbers less zero points, exact in float16."""
    options = {"bits": bits, "block": block, "zeros": "block", "out": "float32"}
    given = operands(160, 20, 160, options)
    given["a"] = np.eye(160, dtype=np.float16)
    given["scales"] = np.full_like(given["scales"], 0.25)
    got = check(interpreter, given, options, tile(64, 32, 64))
    np.testing.assert_array_equal(got.T, dequantized(given, CONTRACT.options(options)))


@pytest.mark.interpreter
def test_rows_of_a_wider_tensor(interpreter: ModuleType) -> None:
    given = operands(20, 33, 70, {})
    given["a"] = np.pad(given["a"], ((0, 0), (3, 23)))[:, 3:73]
    check(interpreter, given, {"out": "float32"}, tile())


@pytest.mark.parametrize("bits", ["4", "8", "nf4"])
@pytest.mark.parametrize("depth", [1, 16, 31, 32, 33, 100])
def test_packing_is_undone_by_unpacking(bits: str, depth: int) -> None:
    numbers = np.random.default_rng(depth).integers(0, 256 if bits == "8" else 16, (5, depth), np.uint8)
    packed = pack(numbers, bits)
    assert packed.shape == (5, -(-depth // (16 if bits == "8" else 32)), 16)
    np.testing.assert_array_equal(unpack(packed, depth, bits), numbers)


def test_the_order_of_a_chunk() -> None:
    packed = pack(np.arange(32, dtype=np.uint8)[None] % 16, "4")
    np.testing.assert_array_equal(packed[0, 0], np.arange(16) * 17)
    marked = np.zeros((1, 64), np.uint8)
    marked[0, 32 + 5], marked[0, 32 + 16 + 5] = 3, 12
    assert pack(marked, "4")[0, 1, 5] == 3 | 12 << 4


@pytest.mark.parametrize(("bits", "block", "depth"), [(4, 16, 64), (4, 32, 100), (4, 128, 200), (8, 32, 96)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_reference_is_matmul_nbits(bits: int, block: int, depth: int, asymmetric: bool) -> None:
    rng = np.random.default_rng([bits, block])
    columns, blocks = 20, -(-depth // block)
    packed = rng.integers(0, 256, (columns, blocks, block * bits // 8), np.uint8)
    scales = rng.uniform(0.05, 0.2, (columns, blocks)).astype(np.float32)
    zeros = rng.integers(0, 256, (columns, -(-blocks * bits // 8)), np.uint8) if asymmetric else None
    a = rng.normal(0, 1, (6, depth)).astype(np.float16).astype(np.float32)
    attributes = {"K": depth, "N": columns, "bits": bits, "block_size": block}
    inputs = [a, packed, scales, *([zeros] if zeros is not None else [])]
    [want] = run_operator("MatMulNBits", inputs, attributes=attributes, domain="com.microsoft")
    options = {"bits": str(bits), "block": str(block), "zeros": "block" if asymmetric else "none", "out": "float32"}
    given = from_nbits(packed, scales, zeros, depth, bits) | {"a": a.astype(np.float16)}
    CONTRACT.check(given, CONTRACT.options(options))
    got = reference(given, CONTRACT.options(options))["out"]
    # The engine sums float32 products, and may take the zero point's part by itself.
    magnitude = np.abs(a) @ (np.abs(dequantized(given, CONTRACT.options(options))) + 255 * scales.max()).T
    assert (np.abs(got - want) <= (depth + 4) * ROUNDING["float32"] * magnitude).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_a_pass_packed(bits: int) -> None:
    """What our own pass writes for MatMulNBits gives the same arguments as the Q/DQ form that it comes from."""
    rng = np.random.default_rng(4)
    numbers, zeros = (rng.integers(0, 1 << bits, shape) for shape in ((70, 6), (3, 6)))
    scales = rng.uniform(0.1, 1, (3, 6)).astype(np.float32)
    packed = matmul_nbits.pack_weight(numbers, zeros, 32, bits)
    points = matmul_nbits.pack(zeros.T, bits)
    found = from_nbits(np.asarray(packed), np.ascontiguousarray(scales.T), points, 70, bits)
    kind = ml_dtypes.uint4 if bits == 4 else np.uint8
    want = from_blocks(numbers.astype(kind), scales, zeros.astype(kind), 32, bits)
    assert found.keys() == want.keys()
    for name, array in want.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("shape", ["blocked", "column", "tensor"])
def test_weights_of_dequantize_linear(dtype: str, shape: str) -> None:
    rng = np.random.default_rng(3)
    kind = getattr(ml_dtypes, dtype) if dtype.endswith("int4") else np.dtype(dtype)
    bits, signed = (4 if dtype.endswith("int4") else 8), dtype.startswith("int")
    least = -(1 << (bits - 1)) if signed else 0
    numbers = rng.integers(least, least + (1 << bits), (70, 6)).astype(kind)
    form = {"blocked": (3, 6), "column": (6,), "tensor": ()}[shape]
    scales = rng.uniform(0.1, 1, form).astype(np.float32)
    zeros = rng.integers(least, least + (1 << bits), form).astype(kind)
    given = from_blocks(numbers, scales, zeros, 32, bits) | {"a": np.zeros((1, 70), np.float16)}
    options = CONTRACT.options({"bits": str(bits), "zeros": "block" if "zeros" in given else "none"})
    CONTRACT.check(given, options)
    spread = np.repeat(np.broadcast_to(zeros.astype(int), (3, 6)), 32, 0)[:70]
    scale = np.repeat(np.broadcast_to(scales, (3, 6)), 32, 0)[:70]
    want = (numbers.astype(int) - spread).astype(np.float32) * scale
    np.testing.assert_array_equal(dequantized(given, options), want.T)
    plain = from_blocks(numbers, scales, None, 32, bits)
    assert ("zeros" in plain) == (not signed)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"w": np.zeros((5, 1, 16), np.uint8)}, {}, r"w must have K/32 = 2"),
        ({"a": np.zeros((3, 64), np.float32)}, {}, "a must have dtype float16 or bfloat16; found float32"),
        ({}, {"block": "16"}, r"scales must have K/block = 4"),
        ({"zeros": np.zeros((2, 5), np.uint8)}, {}, "takes zeros only with zeros block"),
        ({}, {"bits": "8"}, "takes w only with bits 4 or nf4"),
        ({}, {"block": "48"}, "block cannot be '48'"),
        ({"codebook": np.zeros(16, np.float32), "zeros": np.zeros((2, 5), np.uint8)}, {"bits": "nf4", "zeros": "block"},
         "a codebook has no zero points"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(changes: dict[str, Any], options: dict[str, str], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CONTRACT.check(operands(3, 5, 64, {}) | changes, CONTRACT.options(options))


def test_other_widths_of_matmul_nbits_are_refused() -> None:
    with pytest.raises(TargetError, match="4 or 8 bits; found 2"):
        from_nbits(np.zeros((1, 1, 8), np.uint8), np.ones((1, 1), np.float32), None, 32, 2)
    with pytest.raises(TargetError, match="packed zero points in uint8; found float32"):
        from_nbits(np.zeros((1, 1, 16), np.uint8), np.ones((1, 1), np.float32), np.ones(1, np.float32), 32, 4)


@pytest.mark.aot
def test_weights_are_loaded_128_bits_wide_and_nothing_is_converted() -> None:
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for

    [found] = [c for c in compilations(KERNEL, "sm90", full=False) if c.case.label == "f16, blocks of 128"]
    compiled = compile_for(found.calls[0], "sm90")
    assert not {8, 32, 64} & set(compiled.loads)  # 16: scales
    assert compiled.loads[128] >= 8
    assert compiled.instructions.get("I2F", 0) <= 4  # divisions by run-time tile counts; none per weight
    assert "HGMMA" in compiled.matrix

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from qcompiler.kernels.config import Config, config
from qcompiler.kernels.epilogue.contract import ACTIVATIONS
from qcompiler.kernels.int4_matmul.reference import dequantized, reference
from qcompiler.kernels.int4_matvec.contract import CONTRACT
from tests.kernels.test_int4_matmul import DTYPES, check, operands, tile

KERNEL = "int4_matvec"


def row(n: int = 64, k: int = 128, *, split: int = 1) -> Config:
    return config({"BLOCK_M": 1, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split})


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 64, 256), (1, 33, 147), (3, 70, 300), (1, 1, 1), (1, 300, 129)])
def test_ragged_shapes_without_matrix_units(interpreter: ModuleType, m: int, n: int, k: int, split: int) -> None:
    options = {"out": "float32", "zeros": "block"}
    check(interpreter, operands(m, n, k, options), options, row(split=split), KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize(("split", "swap"), [(1, 1), (2, 0), (5, 1)])
@pytest.mark.parametrize(("m", "n", "k"), [(16, 64, 256), (2, 33, 147), (50, 70, 300)])
def test_ragged_shapes_on_matrix_units(interpreter: ModuleType, m: int, n: int, k: int, split: int, swap: int) -> None:
    options = {"out": "float32", "zeros": "block"}
    cut = tile(16 if m <= 16 else 64, split=split, swap=swap)
    check(interpreter, operands(m, n, k, options), options, cut, KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize("block", ["16", "32", "64", "128", "256"])
@pytest.mark.parametrize("bits", ["4", "8"])
def test_every_block_with_zero_points(interpreter: ModuleType, bits: str, block: str) -> None:
    options = {"bits": bits, "block": block, "zeros": "block", "out": "float32"}
    check(interpreter, operands(1, 48, 300, options), options, row(split=2), KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize("block", ["16", "32", "256"])
@pytest.mark.parametrize("bits", ["4", "8", "nf4"])
def test_every_block_without_zero_points(interpreter: ModuleType, bits: str, block: str) -> None:
    options = {"bits": bits, "block": block, "out": "float32"}
    check(interpreter, operands(1, 40, 256, options), options, row(), KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "m", "split"), [("float16", 1, 1), ("bfloat16", 1, 2), ("float16", 5, 2)])
@pytest.mark.parametrize("out", ["float16", "bfloat16", "float32", "int8", "uint8", "float8e4m3fn"])
def test_every_dtype(interpreter: ModuleType, dtype: str, out: str, m: int, split: int) -> None:
    options = {"out": out, "bias": "channel"} | ({"out_scale": "scalar"} if out in ("int8", "uint8") else {})
    given = operands(m, 300, 64, options, dtype, scales="float32")
    given["bias"] = np.random.default_rng(1).normal(0, 1, 300).astype(DTYPES[dtype])
    given |= {"out_zero": 3, "out_inverse": 0.9} if out in ("int8", "uint8") else {}
    check(interpreter, given, options, row(k=32, split=split) if m == 1 else tile(16, k=32, split=split), KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_residuals(interpreter: ModuleType, activation: str, split: int) -> None:
    place = "before" if activation in ("relu", "silu", "clip") else "after"
    options = {"activation": activation, "residual": place, "out": "float32"}
    given = operands(2, 40, 64, options) | {"residual_scale": 0.37, "residual_zero": -128}
    given["residual"] = np.random.default_rng(2).integers(-128, 128, (2, 40), np.int8)
    given |= {"low": 0.1} if activation in ("clip", "leaky_relu") else {}
    given |= {"high": 3.0} if activation == "clip" else {}
    check(interpreter, given, options, row(k=32, split=split), KERNEL)


@pytest.mark.interpreter
@pytest.mark.parametrize("bits", ["4", "8"])
@pytest.mark.parametrize("block", ["16", "32", "128"])
def test_unpacking_is_exact(interpreter: ModuleType, bits: str, block: str) -> None:
    """Rows of the unit matrix give the weights themselves, scales too: only one product of a row is not zero."""
    options = {"bits": bits, "block": block, "zeros": "block", "out": "float32"}
    given = operands(64, 20, 64, options)
    given["a"] = np.eye(64, dtype=np.float16)[[0, 1, 15, 16, 17, 30, 31, 32, 47, 48, 63]]
    got = check(interpreter, given, options, row(32, 64), KERNEL)
    want = dequantized(given, CONTRACT.options(options)).T
    np.testing.assert_array_equal(got, want[np.argmax(given["a"], 1)])


@pytest.mark.interpreter
def test_parts_are_added_in_their_order(interpreter: ModuleType) -> None:
    """The result does not depend on which part ends first: it is the float32 sum of the parts from the first on."""
    given = operands(1, 50, 512, {}, scales="float32")
    parts = []
    for k in range(0, 512, 128):
        part = {"a": given["a"][:, k : k + 128], "w": np.ascontiguousarray(given["w"][:, k // 32 : k // 32 + 4])}
        part["scales"] = given["scales"][k // 32 : k // 32 + 4]
        parts.append(interpreter.run_kernel(KERNEL, part, {"out": "float32"}, row()).outputs["out"])
    got = interpreter.run_kernel(KERNEL, given, {"out": "float32"}, row(split=4)).outputs["out"]
    np.testing.assert_array_equal(got, ((parts[0] + parts[1]) + parts[2]) + parts[3])


@pytest.mark.interpreter
def test_parts_may_be_empty(interpreter: ModuleType) -> None:
    """With 5 tiles on 4 parts the last part has none: its share is zero, not what memory held."""
    for cut in (row(split=4), tile(16, 64, 128, split=4)):
        given = operands(1, 20, 640, {})
        check(interpreter, given, {"out": "float32"}, cut, KERNEL)


def test_traffic_is_that_of_every_tensor_once() -> None:
    given = operands(1, 128, 256, {}) | {"out": np.zeros((1, 128), np.float16)}
    least = CONTRACT.traffic(given, CONTRACT.options({}))
    assert (least.read, least.written, least.macs) == (512 + 128 * 128 + 2 * 8 * 128, 256, 128 * 256)
    assert reference(given, CONTRACT.options({}))["out"].shape == (1, 128)


@pytest.mark.aot
def test_weights_are_loaded_128_bits_wide_without_conversions() -> None:
    from qcompiler.kernels.launching import compilations
    from qcompiler.kernels.proof.compiling import compile_for

    [found] = [c for c in compilations(KERNEL, "sm90", full=False) if c.case.dims["M"] == 1]
    product, adding = (compile_for(call, "sm90") for call in found.calls)
    assert product.matrix == ()
    assert set(product.loads) == {32, 128}  # weights; 32: two scales or activations
    assert product.loads[128] >= 2
    assert product.instructions.get("I2F", 0) == 0
    assert product.programs_per_processor >= 3
    assert set(adding.loads) <= {32, 64, 128}

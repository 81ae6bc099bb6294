"""The tests' own instruments: what the guard catches, and that the repaired interpreter rounds right."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

pytestmark = pytest.mark.interpreter


@pytest.fixture
def faulty() -> ModuleType:
    from tests.kernels import faulty_kernels

    return faulty_kernels


def launch(interpreter: ModuleType, function: Any, x: np.ndarray, out: np.ndarray, block: int) -> Any:
    tensors = {"x": interpreter.to_torch(x), "out": interpreter.to_torch(out)}
    from qcompiler.kernels.proof.interpreting import interpreted

    with interpreter.watched(tensors, ["out"]) as watch, interpreted():
        function[(1,)](tensors["x"], tensors["out"], out.size, BLOCK=block)
    return watch, interpreter.to_numpy(tensors["out"])


def test_a_load_outside_is_caught(interpreter: ModuleType, faulty: ModuleType) -> None:
    x = np.zeros(30, np.int32)
    with pytest.raises(Exception, match="2 accesses outside every tensor"):
        launch(interpreter, faulty.copy_without_mask, x, np.zeros(30, np.int32), 32)


def test_a_store_into_an_input_is_caught(interpreter: ModuleType, faulty: ModuleType) -> None:
    with pytest.raises(Exception, match="a store into x, which is read-only"):
        launch(interpreter, faulty.store_into_input, np.zeros(30, np.int32), np.zeros(30, np.int32), 32)


def test_bytes_are_counted_by_mask(interpreter: ModuleType, faulty: ModuleType) -> None:
    watch, _ = launch(interpreter, faulty.copy_without_mask, np.zeros(32, np.int32), np.zeros(30, np.int32), 32)
    assert (watch.read, watch.written) == (32 * 4, 30 * 4)


def test_poison_is_never_a_result(interpreter: ModuleType) -> None:
    from qcompiler.kernels.operand import Operand

    for dtype in ("float32", "float16", "bfloat16", "float8e4m3fn"):
        assert np.isnan(interpreter.to_numpy(interpreter.poisoned(Operand(dtype, (3, 2)))).astype(np.float32)).all()
    assert (interpreter.to_numpy(interpreter.poisoned(Operand("int8", (3, 2)))) == 0x55).all()


@pytest.mark.parametrize("target", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16, np.float16])
def test_casts_round_to_nearest_even(interpreter: ModuleType, faulty: ModuleType, target: Any) -> None:
    most = float(ml_dtypes.finfo(target).max)
    # All numbers of the format up to its largest, what lies half way between neighbours, and what lies beside that.
    width = 8 * np.dtype(target).itemsize
    bits = np.arange(0, 2**width, 1 if width == 8 else 7)
    grid = bits.astype(f"uint{width}").view(target).astype(np.float32)
    grid = np.sort(grid[np.isfinite(grid)])
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    x = np.concatenate([grid, middle, np.nextafter(middle, np.float32(np.inf)), np.float32([-0.0, np.nan])])
    with np.errstate(over="ignore"):
        narrow = x.astype(target)
    want = narrow.astype(np.float32)
    block = 1 << int(np.ceil(np.log2(x.size)))
    _, got = launch(interpreter, faulty.cast_twice, x, np.zeros(x.size, target), block)
    np.testing.assert_array_equal(got.astype(np.float32), want)
    if np.dtype(target).itemsize == 1:  # the device's cast saturates
        beyond = np.float32([most * 2, -most * 2, np.inf])
        _, got = launch(interpreter, faulty.cast_twice, beyond, np.zeros(3, target), 4)
        np.testing.assert_array_equal(got.astype(np.float32), [most, -most, most])

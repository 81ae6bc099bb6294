"""Ranges of constants, per tensor, channel and block."""

import re

import numpy as np
import pytest

from qcompiler.calibration.constant_ranges import estimate_array
from qcompiler.calibration.estimators import estimate
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec
from tests.calibration.estimator_samples import seen

ARRAY = np.random.default_rng(0).standard_t(3, (6, 10, 4)).astype(np.float32)
INT4 = QuantSpec("int4", symmetric=True)


def test_per_tensor() -> None:
    low, high = estimate_array(ARRAY, "mse", INT4)
    assert (low.shape, high.shape) == ((), ())
    assert (float(low), float(high)) == estimate(seen(ARRAY), "mse", INT4)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_per_channel(axis: int) -> None:
    low, high = estimate_array(ARRAY, "min-max", axis=axis)
    others = tuple(i for i in range(3) if i != axis % 3)
    np.testing.assert_array_equal(low, ARRAY.min(axis=others))
    np.testing.assert_array_equal(high, ARRAY.max(axis=others))


def test_every_channel_is_estimated_by_itself() -> None:
    low, high = estimate_array(ARRAY, "mse", INT4, axis=1)
    for index in range(10):
        assert (low[index], high[index]) == estimate(seen(ARRAY[:, index]), "mse", INT4)


@pytest.mark.parametrize("axis", [0, 1, -2])
@pytest.mark.parametrize("block", [1, 2, 4, 10, 64])
def test_per_block(axis: int, block: int) -> None:
    low, high = estimate_array(ARRAY, "min-max", axis=axis, block=block)
    length = ARRAY.shape[axis]
    starts = range(0, length, block)
    parts = [np.take(ARRAY, range(s, min(s + block, length)), axis) for s in starts]
    np.testing.assert_array_equal(low, np.stack([p.min(axis=axis) for p in parts], axis % 3))
    np.testing.assert_array_equal(high, np.stack([p.max(axis=axis) for p in parts], axis % 3))


@pytest.mark.parametrize(
    ("axis", "block", "error"),
    [(3, 0, "an array of 3 axes has no axis 3"), (-4, 0, "an array of 3 axes has no axis -4"),
     (0, -1, "a block has a positive length, not -1")],
)  # fmt: skip
def test_what_cannot_be_is_an_error(axis: int, block: int, error: str) -> None:
    with pytest.raises(CalibrationError, match=f"^{re.escape(error)}$"):
        estimate_array(ARRAY, "min-max", axis=axis, block=block)

"""Ranges of constants: one estimator for a whole array, each of its channels, or each block of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.estimators import estimate_each
from qcompiler.calibration.statistics import TensorStatistics
from qcompiler.engine import Array
from qcompiler.errors import CalibrationError
from qcompiler.quant.spec import QuantSpec

Ranges = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def estimate_array(
    array: Array, estimator: str, spec: QuantSpec | None = None, axis: int | None = None, block: int = 0
) -> Ranges:
    """Estimate the range of a constant per tensor, per index of an axis, or per block along an axis.

    Args:
        array: any float type and shape, with at least one finite element in each part.
        estimator: as `estimate` reads it; the array is one feed.
        spec: what the range is quantized to.
        axis: None for one range over all, else the axis of the channels; negative counts from the end.
        block: 0 for one range per index of ``axis``. Otherwise ``axis`` is the blocked axis, as in ONNX
            QuantizeLinear with ``block_size``: every run of so many elements along it has a range of its own, for each
            index of the other axes; the last block may be shorter.

    Returns:
        (low, high), float64: of shape [], [channels], or the array's with ``axis`` divided by the block, rounded up.

    Raises:
        CalibrationError: there is no such axis, the block is negative, or as `estimate`.
    """
    if axis is None:
        low, high = _each([array.reshape(-1)], estimator, spec)
        return low.reshape(()), high.reshape(())
    if not -array.ndim <= axis < array.ndim:
        raise CalibrationError(f"an array of {array.ndim} axes has no axis {axis}")
    if block < 0:
        raise CalibrationError(f"a block has a positive length, not {block}")
    last = np.moveaxis(array, axis, -1)
    if not block:
        return _each(list(last.reshape(-1, last.shape[-1]).T), estimator, spec)
    starts = range(0, last.shape[-1], block)
    rows = last.reshape(-1, last.shape[-1])
    low, high = _each([row[s : s + block] for row in rows for s in starts], estimator, spec)
    shape = (*last.shape[:-1], len(starts))
    return np.moveaxis(low.reshape(shape), -1, axis), np.moveaxis(high.reshape(shape), -1, axis)


def _each(parts: list[Array], estimator: str, spec: QuantSpec | None) -> Ranges:
    tensors = []
    for part in parts:
        tensor = TensorStatistics()
        tensor.add(part)
        tensors.append(tensor)
    return estimate_each(tensors, estimator, spec)

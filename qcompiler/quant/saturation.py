"""Products of 8 bits that x86 kernels without VNNI add in pairs, in 16 bits that saturate; and weights that cannot.

VPMADDUBSW multiplies unsigned bytes with signed ones and adds the two products of each pair of neighbours as signed
16-bit integers, with saturation (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2,
PMADDUBSW); VPMADDWD with ones then widens to 32 bits. ONNX Runtime's u8 x s8 kernels for SSE4.1, AVX2 and AVX-512
without VNNI work like that (MLAS QgemmU8X8KernelAvx2, QgemvU8S8KernelAvx2, ConvSymKernelAvx2 and their AVX-512
twins). Neighbours are two rows 2i and 2i + 1 of the reduced dimension, in the order in which the kernel reads it:
channels fastest in a convolution, so across taps where the channels of a group are odd.

Everything here was seen bit for bit on ONNX Runtime 1.31 with an emulated Haswell processor: MatMulInteger (one row and
many), QLinearConv (with and without groups, odd channels, one to three dimensions). u8 x u8 and s8 x s8 take other
kernels that widen to 16 bits first and never saturate, and so does a depthwise convolution of one filter per channel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.quant.arithmetic import quantize, weight_params
from qcompiler.quant.spec import QuantParams, QuantSpec

INT16 = np.iinfo(np.int16)
PAIR_REACH = min(INT16.max // 255, -INT16.min // 255)
"""What the magnitudes of two neighbouring weights of one sign may sum to (128): times 255 it fits int16."""


def pair_sums(x: npt.NDArray[Any], w: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the sums of products of neighbours, exact: int64 [M, ceil(K / 2), N].

    Args:
        x: integers [M, K].
        w: integers [K, N].

    Raises:
        ValueError: the shapes do not go together.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"expected x [M, K] and w [K, N], found {x.shape} and {w.shape}")
    left = _pairs(x.astype(np.int64).T).transpose(2, 0, 1)
    right = _pairs(w.astype(np.int64))
    return np.asarray((left[:, :, :, None] * right[None]).sum(axis=2), np.int64)


def pair_saturated_matmul(x: npt.NDArray[np.uint8], w: npt.NDArray[np.int8]) -> npt.NDArray[np.int32]:
    """Multiply matrices as VPMADDUBSW kernels do: each pair of products saturates at 16 bits, pairs add up in 32.

    Args:
        x: uint8 [M, K].
        w: int8 [K, N]; an odd K ends in a pair of its own.

    Returns:
        int32 [M, N].

    Raises:
        ValueError: another dtype or shape; u8 x u8 and s8 x s8 take kernels that do not saturate.
    """
    if x.dtype != np.uint8 or w.dtype != np.int8:
        raise ValueError(f"expected uint8 and int8, found {x.dtype} and {w.dtype}")
    found = np.zeros((x.shape[0], w.shape[-1]), np.int64)
    for row, each in enumerate(x):  # row by row: all pairs of all outputs at once would not fit the memory
        found[row] = np.clip(pair_sums(each[None], w), INT16.min, INT16.max).sum(axis=1)[0]
    return found.astype(np.int32)


def saturation_share(x: npt.NDArray[np.uint8], w: npt.NDArray[np.int8]) -> float:
    """Return the share of pair sums that saturate, between 0 and 1, for uint8 [M, K] and int8 [K, N]."""
    total = saturated = 0
    for each in x:
        sums = pair_sums(each[None], w)
        total += sums.size
        saturated += int(((sums < INT16.min) | (sums > INT16.max)).sum())
    return saturated / total if total else 0.0


def summed_columns(weight: Array, op_type: str) -> Array:
    """Lay a weight out as [K, channels], K in the order in which the kernels add its products.

    Args:
        weight: [K, N] of MatMul and Gemm, [M, C / group, ...] of Conv, [directions, 4 x hidden, inputs] of LSTM.
        op_type: ONNX operator type.

    Raises:
        ValueError: an operator whose kernels are not known here.
    """
    if op_type in ("MatMul", "Gemm"):
        return weight
    if op_type == "Conv":
        return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], math.prod(weight.shape[1:])).T
    if op_type == "LSTM":
        return weight.reshape(math.prod(weight.shape[:-1]), weight.shape[-1]).T
    raise ValueError(f"no kernel of {op_type} is known to add pairs; expected MatMul, Gemm, Conv or LSTM")


def pair_reach(columns: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return, for each column of [K, N], the largest sum of magnitudes of one sign in any pair: [N].

    Neighbours of opposite signs work against each other: the worst activation is 255 at one and 0 at the other.
    """
    pairs = _pairs(columns)
    rising = np.maximum(pairs, 0).sum(axis=1).max(axis=0, initial=0)
    falling = np.maximum(-pairs, 0).sum(axis=1).max(axis=0, initial=0)
    return np.asarray(np.maximum(rising, falling))


def pairs_fit(columns: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Return for each column of integers [K, N] whether no unsigned 8-bit activation saturates a pair: bool [N]."""
    return np.asarray(pair_reach(columns.astype(np.int64)) <= PAIR_REACH)


def pair_safe_params(weight: Array, spec: QuantSpec, op_type: str) -> QuantParams:
    """Find the finest symmetric scales at which no pair of a weight can saturate, whatever the activation.

    Seven bits are the price only of a channel whose two largest weights are neighbours of one sign; most channels
    keep nearly eight. A larger scale never makes an integer larger, so scales that `fit_bias` raises stay safe.

    Args:
        weight: float, laid out as the operator has it.
        spec: symmetric format of 8 bits, per channel or per tensor.
        op_type: MatMul, Gemm, Conv or LSTM.

    Returns:
        Parameters; `quantize` with them gives integers for which `pairs_fit` holds.
    """
    spec = replace(spec, bits=0, narrow=True)
    params = weight_params(weight, spec)
    columns = summed_columns(weight.astype(np.float64), op_type)
    reach, largest = pair_reach(columns), np.abs(columns).max(axis=0, initial=0.0)
    if spec.axis is None:
        reach, largest = reach.max(initial=0.0, keepdims=True), largest.max(initial=0.0, keepdims=True)
    steps = np.full(reach.shape, float(spec.storage.qmax))
    # Rounding lifts each of two neighbours by a half at most: above this many steps a pair is too large for sure.
    crowded = reach > 0
    steps[crowded] = np.minimum(steps, np.floor((PAIR_REACH + 1) * largest / np.maximum(reach, 1e-300)))[crowded]
    while True:
        scale = np.maximum(params.scale.reshape(-1), (largest / steps).astype(np.float32)).reshape(params.scale.shape)
        made = QuantParams(spec, scale, params.zero_point)
        fits = pairs_fit(summed_columns(quantize(weight, made), op_type))
        if spec.axis is None:
            fits = np.asarray([fits.all()])
        if fits.all():
            return made
        steps[~fits] -= 1.0


def _pairs(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Split [K, N] into [ceil(K / 2), 2, N]; what an odd K lacks is zero."""
    if rows.shape[0] % 2:
        rows = np.concatenate([rows, np.zeros((1, rows.shape[1]), rows.dtype)])
    return rows.reshape(rows.shape[0] // 2, 2, rows.shape[1])

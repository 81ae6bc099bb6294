"""``int4_matmul`` in NumPy (sums in float64), and how weights are packed for it and for ``int4_matvec``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.errors import TargetError
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.reference import finish
from qcompiler.kernels.int4_matmul.contract import CHUNK, weight_name

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The 4-bit NormalFloat codebook (Dettmers et al., QLoRA, 2023, appendix E)."""


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs, from weights that are not rounded to the dtype of ``a``.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [M, N].
    """
    w = dequantized(given, options)
    total = given["a"].astype(np.float64) @ w.astype(np.float64).T
    return {"out": finish(np.asarray(total, np.float32), given, options)}


def dequantized(given: Mapping[str, Any], options: Options) -> npt.NDArray[np.float32]:
    """Return the weights [N, K] as float32."""
    depth, block = given["a"].shape[1], int(options["block"])
    numbers = unpack(given[weight_name(options)], depth, options["bits"])
    scale = np.repeat(given["scales"].astype(np.float32).T, block, axis=1)[:, :depth]
    if options["bits"] == "nf4":
        return np.asarray(given["codebook"][numbers] * scale, np.float32)
    middle = np.full(given["scales"].shape, 128 if options["bits"] == "8" else 8, np.uint8)
    zero = given["zeros"] if options["zeros"] == "block" else middle
    wide = np.repeat(zero.T, block, axis=1)[:, :depth].astype(np.int32)
    return np.asarray((numbers.astype(np.int32) - wide).astype(np.float32) * scale, np.float32)


def pack(numbers: Array, bits: str) -> npt.NDArray[np.uint8]:
    """Pack unsigned numbers [N, K] to [N, K/32, 16] (4 bits, nf4) or [N, K/16, 16] (8 bits), filled up with zeros.

    Args:
        numbers: integers or ml_dtypes' uint4, all in the range of ``bits``.
        bits: as the option.
    """
    columns = numbers.shape[0]
    step = CHUNK if bits == "8" else 2 * CHUNK
    stored = numbers.astype(np.uint8)
    chunks = np.pad(stored, ((0, 0), (0, -stored.shape[1] % step))).reshape(columns, -1, step)
    return np.ascontiguousarray(chunks if bits == "8" else chunks[..., :CHUNK] | chunks[..., CHUNK:] << 4)


def unpack(packed: npt.NDArray[np.uint8], depth: int, bits: str) -> npt.NDArray[np.uint8]:
    """Return the numbers [N, depth] of packed weights."""
    parts = packed if bits == "8" else np.concatenate([packed & 15, packed >> 4], axis=-1)
    return np.ascontiguousarray(parts.reshape(packed.shape[0], -1)[:, :depth])


def from_nbits(
    packed: npt.NDArray[np.uint8], scales: Array, zero_points: npt.NDArray[np.uint8] | None, depth: int, bits: int
) -> dict[str, Array]:
    """Return the weight arguments for the constants of a com.microsoft MatMulNBits.

    Args:
        packed: its ``B``, uint8 [N, blocks, block * bits / 8], the first number in the lowest bits.
        scales: [N, blocks] or flat.
        zero_points: uint8 [N, blocks * bits / 8] (rounded up) or flat, None for the middle of the range.
        depth: its attribute K.
        bits: 4 or 8.

    Returns:
        ``w`` or ``w8``, ``scales``, and ``zeros`` if there are zero points.

    Raises:
        TargetError: another number of bits, or zero points that are floats.
    """
    if bits not in (4, 8):
        raise TargetError(f"int4_matmul takes MatMulNBits of 4 or 8 bits; found {bits}")
    if zero_points is not None and zero_points.dtype != np.uint8:
        raise TargetError(f"int4_matmul takes packed zero points in uint8; found {zero_points.dtype}")
    columns, blocks, _ = packed.shape
    numbers = _numbers(packed.reshape(columns, -1), bits)[:, :depth]
    found: dict[str, Array] = {"w8" if bits == 8 else "w": pack(numbers, str(bits))}
    found["scales"] = np.ascontiguousarray(scales.reshape(columns, blocks).T)
    if zero_points is not None:
        found["zeros"] = np.ascontiguousarray(_numbers(zero_points.reshape(columns, -1), bits)[:, :blocks].T)
    return found


def from_blocks(numbers: Array, scales: Array, zero_points: Array | None, block: int, bits: int) -> dict[str, Array]:
    """Return the weight arguments for a DequantizeLinear of a weight [K, N] along axis 0.

    Args:
        numbers: stored numbers, signed or unsigned, of 4 or 8 bits.
        scales: [blocks, N], or [N] or [] for one scale per column or tensor.
        zero_points: of the dtype of the numbers and the shape of the scales, None for 0.
        block: block size; any of the option's for scales per column or tensor.
        bits: 4 or 8.

    Returns:
        As `from_nbits`; signed numbers are shifted by 8 or 128.
    """
    stored = numbers.astype(np.int32)
    middle = 1 << (bits - 1)
    shift = middle if np.dtype(numbers.dtype).name.startswith("int") else 0
    shape = (-(-stored.shape[0] // block), stored.shape[1])
    found: dict[str, Array] = {"w8" if bits == 8 else "w": pack((stored + shift).T, str(bits))}
    found["scales"] = np.ascontiguousarray(np.broadcast_to(scales, shape))
    zeros = np.zeros((), np.int32) if zero_points is None else zero_points.astype(np.int32)
    if (zeros + shift != middle).any():
        found["zeros"] = np.ascontiguousarray(np.broadcast_to(zeros + shift, shape).astype(np.uint8))
    return found


def _numbers(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return unsigned numbers packed along the last axis, the first in the lowest bits."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)

"""com.microsoft MatMulNBits: a product with a weight stored in 2, 4 or 8 bits, in blocks along K.

The layout is that of the contrib operator's documentation: ``B`` is uint8 [N, blocks, block_size * bits / 8], unsigned
numbers, the first in the lowest bits; scales are [N, blocks]; zero points are packed the same way along the blocks, and
2 ** (bits - 1) where there are none. A weight with one scale per column is cut into blocks with equal scales.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array

PLAIN_BLOCK = 32
"""Block that a weight with one scale per column or tensor is cut into, as ONNX Runtime does itself."""
LEAST_BLOCK = 16
BITS = (2, 4, 8)


def packs(bits: int, block: int) -> bool:
    """Return whether the operator takes a number of bits and a block size (a power of two from 16)."""
    return bits in BITS and block >= LEAST_BLOCK and block & (block - 1) == 0


def pack(numbers: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.uint8]:
    """Pack unsigned numbers along the last axis into bytes, the first in the lowest bits; the last byte is filled."""
    per_byte = 8 // bits
    short = -numbers.shape[-1] % per_byte
    wide = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, short)])
    parts = wide.reshape(*wide.shape[:-1], -1, per_byte) << (bits * np.arange(per_byte))
    return np.asarray(parts.sum(axis=-1), np.uint8)


def pack_weight(q: npt.NDArray[np.int64], zero: npt.NDArray[np.int64], block: int, bits: int) -> Array:
    """Return ``B`` of a weight.

    Args:
        q: unsigned numbers [K, N].
        zero: unsigned zero points [blocks, N], with which the last block is filled up.
        block: block size.
        bits: bits per number.

    Returns:
        uint8 [N, blocks, block * bits / 8].
    """
    length, columns = q.shape
    blocks = zero.shape[0]
    filled = np.repeat(zero, block, axis=0)
    filled[:length] = q
    return pack(filled.T.reshape(columns, blocks, block), bits)


def per_block(values: Array, shape: tuple[int, int], blocked: bool) -> Array:
    """Spread numbers per tensor or column over blocks.

    Args:
        values: [], [N] or [blocks, N].
        shape: (blocks, N).
        blocked: whether they are per block already.
    """
    return values if blocked else np.broadcast_to(values.reshape(1, -1), shape)

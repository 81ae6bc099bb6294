"""``int4_matvec`` in NumPy: the product of ``int4_matmul``, whose packing it shares."""

from __future__ import annotations

from qcompiler.kernels.int4_matmul.reference import from_blocks, from_nbits, pack, reference, unpack

__all__ = ["from_blocks", "from_nbits", "pack", "reference", "unpack"]

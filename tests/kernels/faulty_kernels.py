"""Kernels with one mistake each, which the tests' interpreter must catch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_without_mask(x_ptr, out_ptr, N, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets), mask=offsets < N)


@triton.jit
def store_into_input(x_ptr, out_ptr, N, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + offsets, offsets, mask=offsets < N)


@triton.jit
def cast_twice(x_ptr, out_ptr, N, BLOCK: tl.constexpr):  # noqa: N803
    offsets = tl.arange(0, BLOCK)
    narrow = tl.load(x_ptr + offsets, mask=offsets < N, other=0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, narrow, mask=offsets < N)

"""Where a tile of pixels by channels lies, and how its sums are finished and stored."""

from __future__ import annotations

import triton
import triton.language as tl

from qcompiler.kernels.epilogue.triton_kernel import finish


@triton.jit
def banded_tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the tile of this program; bands of GROUP_M tiles share their weights in the cache."""
    per_band = GROUP_M * tiles_n
    band = tl.program_id(0) // per_band
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    return band * GROUP_M + (tl.program_id(0) % per_band) % height, (tl.program_id(0) % per_band) // height


@triton.jit
def window_starts(pixel, P, Q, stride_h, stride_w, pad_top, pad_left):
    """Return picture, row and place of the first tap of each pixel's window."""
    line = pixel // Q
    return line // P, (line % P) * stride_h - pad_top, (pixel % Q) * stride_w - pad_left


@triton.jit
def store_tile(
    total,
    out_ptr,
    multiplier_ptr,
    offset_ptr,
    bias_ptr,
    residual_ptr,
    first_row,
    first_column,
    row_mask,
    column_mask,
    stride_out,
    stride_residual,
    scale,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    MULTIPLIER: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Finish a tile of sums and store it."""
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    if OFFSET == "channel":
        total += tl.load(offset_ptr + first_column + column, mask=column_mask, other=0)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    out_ptrs = out_ptr + first_row.to(tl.int64) * stride_out + first_column
    out_ptrs = out_ptrs + row[:, None] * stride_out + column[None, :]
    if OUT == "int32":
        tl.store(out_ptrs, total, mask=mask)
    else:
        if MULTIPLIER == "channel":
            factor = tl.load(multiplier_ptr + first_column + column, mask=column_mask, other=0.0)[None, :]
        else:
            factor = scale
        residual_ptrs = out_ptrs
        if RESIDUAL != "none":
            residual_ptrs = residual_ptr + first_row.to(tl.int64) * stride_residual + first_column
            residual_ptrs = residual_ptrs + row[:, None] * stride_residual + column[None, :]
        bias_ptrs = column
        if BIAS == "channel":
            bias_ptrs = bias_ptr + first_column + column
        result = finish(
            total.to(tl.float32) * factor,
            bias_ptrs,
            residual_ptrs,
            column_mask,
            mask,
            low,
            high,
            residual_scale,
            residual_zero,
            out_inverse,
            out_zero,
            BIAS,
            RESIDUAL,
            ACTIVATION,
            OUT_SCALE,
            OUT,
        )
        tl.store(out_ptrs, result, mask=mask)

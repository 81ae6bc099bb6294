"""``int4_matvec`` in Triton: a row by blocks of weights, the sum of parts; more rows go to the matrix units."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.triton_kernel import finish
from qcompiler.kernels.int4_matmul.triton_kernel import arguments_of, numbers, product


@triton.jit(do_not_specialize=["M", "residual_zero", "out_zero"])
def int4_row(
    a_ptr,
    w_ptr,
    scales_ptr,
    zeros_ptr,
    codebook_ptr,
    bias_ptr,
    residual_ptr,
    partial_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_am,
    stride_w,
    stride_s,
    stride_z,
    stride_om,
    stride_rm,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZEROS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Multiply one row by BLOCK_N columns of a part of K."""
    packed: tl.constexpr = BITS != "8"
    each: tl.constexpr = 32 if packed else 16
    chunks: tl.constexpr = BLOCK_K // each
    turns: tl.constexpr = 2 if packed and BLOCK == 16 else 1

    first_column = tl.program_id(0) * BLOCK_N
    part = tl.program_id(1)
    line = tl.program_id(2)
    column = tl.arange(0, BLOCK_N)
    chunk = tl.arange(0, chunks)
    byte = tl.arange(0, 16)
    column_mask = column < N - first_column
    step = chunk[:, None] * each + byte[None, :]
    a_ptrs = a_ptr + line.to(tl.int64) * stride_am + step
    w_start = w_ptr + first_column.to(tl.int64) * stride_w
    w_ptrs = w_start + (column[:, None, None] * stride_w + chunk[None, :, None] * 16 + byte[None, None, :])
    all_chunks = tl.cdiv(K, each)
    all_groups = tl.cdiv(K, BLOCK)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    start = part * length
    total = tl.zeros((BLOCK_N, chunks), tl.float32)
    for k in range(start, tl.minimum(K, start + length), BLOCK_K):
        mask = column_mask[:, None]
        if EVEN_K:
            a = tl.load(a_ptrs + k).to(tl.float32)[None, :, :]
        else:
            mask = mask & (chunk < all_chunks - k // each)[None, :]
            a = tl.load(a_ptrs + k, mask=step < K - k, other=0.0).to(tl.float32)[None, :, :]
        stored = tl.load(w_ptrs + k // each * 16, mask=mask[:, :, None], other=0, eviction_policy="evict_first")
        at = (k + chunk * each) // BLOCK
        zero = 128.0 if BITS == "8" else 8.0
        if ZEROS == "block":
            zero_ptrs = zeros_ptr + at[None, :].to(tl.int64) * stride_z + first_column + column[:, None]
            zero = tl.load(zero_ptrs, mask=mask, other=0).to(tl.float32)[:, :, None]
        scale_ptrs = scales_ptr + at[None, :].to(tl.int64) * stride_s + first_column + column[:, None]
        scale = tl.load(scale_ptrs, mask=mask, other=0.0).to(tl.float32)
        # Sums of products, not products of sums of both halves: these contract to one instruction each.
        total += tl.sum(a * numbers(stored, zero, codebook_ptr, BITS, False), 2) * scale
        if packed:
            if EVEN_K:
                a = tl.load(a_ptrs + (k + 16)).to(tl.float32)[None, :, :]
            else:
                a = tl.load(a_ptrs + (k + 16), mask=step + 16 < K - k, other=0.0).to(tl.float32)[None, :, :]
            if turns == 2:
                mask = mask & (at + 1 < all_groups)[None, :]
                if ZEROS == "block":
                    zero = tl.load(zero_ptrs + stride_z, mask=mask, other=0).to(tl.float32)[:, :, None]
                scale = tl.load(scale_ptrs + stride_s, mask=mask, other=0.0).to(tl.float32)
            if BITS == "4":
                scale = scale * 0.0625
            total += tl.sum(a * numbers(stored, zero, codebook_ptr, BITS, True), 2) * scale

    sums = tl.sum(total, 1)
    if SPLIT > 1:
        partial = partial_ptr + (part * M + line).to(tl.int64) * N + first_column
        tl.store(partial + column, sums, mask=column_mask)
    else:
        out_ptrs = out_ptr + line.to(tl.int64) * stride_om + first_column + column[None, :]
        residual_ptrs = out_ptrs
        if RESIDUAL != "none":
            residual_ptrs = residual_ptr + line.to(tl.int64) * stride_rm + first_column + column[None, :]
        bias_ptrs = column
        if BIAS == "channel":
            bias_ptrs = bias_ptr + first_column + column
        result = finish(
            sums[None, :],
            bias_ptrs,
            residual_ptrs,
            column_mask,
            column_mask[None, :],
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
        tl.store(out_ptrs, result, mask=column_mask[None, :])


@triton.jit(do_not_specialize=["M", "residual_zero", "out_zero"])
def add_parts(
    partial_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_om,
    stride_rm,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add the parts of one row in their order, and finish it."""
    first_column = tl.program_id(0) * COLUMNS
    line = tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    column_mask = column < N - first_column
    partial_ptrs = partial_ptr + line.to(tl.int64) * N + first_column + column
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(partial_ptrs + tl.cast(part * M, tl.int64) * N, mask=column_mask, other=0.0)
    out_ptrs = out_ptr + line.to(tl.int64) * stride_om + first_column + column[None, :]
    residual_ptrs = out_ptrs
    if RESIDUAL != "none":
        residual_ptrs = residual_ptr + line.to(tl.int64) * stride_rm + first_column + column[None, :]
    bias_ptrs = column
    if BIAS == "channel":
        bias_ptrs = bias_ptr + first_column + column
    result = finish(
        total[None, :],
        bias_ptrs,
        residual_ptrs,
        column_mask,
        column_mask[None, :],
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
    tl.store(out_ptrs, result, mask=column_mask[None, :])


COLUMNS = 256
"""Columns that one program of `add_parts` adds."""


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches: the product, and with SPLIT above 1 the sum of its parts.

    Args:
        tensors: arguments by name, checked against the contract, with ``out`` and the scratch.
        options: complete.
        config: with BLOCK_M (1: no matrix units), BLOCK_N, BLOCK_K and SPLIT; for matrix units also GROUP_M and SWAP.
    """
    arguments = arguments_of(tensors, options)
    columns = arguments["N"]
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    if config["BLOCK_M"] == 1:
        own = constants | {"BLOCK": int(options["block"]), "EVEN_K": arguments["K"] % config["BLOCK_K"] == 0}
        own |= {name: config[name] for name in ("BLOCK_N", "BLOCK_K", "SPLIT")}
        grid = (-(-columns // config["BLOCK_N"]), config["SPLIT"], arguments["M"])
        found = [Call(int4_row, grid, arguments, own, config)]
    else:
        found = [product(tensors, options, config)]
    if config["SPLIT"] > 1:
        own = {name: constants[name] for name in ("BIAS", "RESIDUAL", "ACTIVATION", "OUT_SCALE", "OUT")}
        own |= {"SPLIT": config["SPLIT"], "COLUMNS": COLUMNS}
        kept = {name: arguments[name] for name in add_parts.arg_names if name in arguments}
        adding = Config(config.tile, 4, 1)
        found.append(Call(add_parts, (-(-columns // COLUMNS), arguments["M"], 1), kept, own, adding))
    return found


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every format and kind of epilogue once."""
    row = {"M": 1, "N": 8192, "K": 8192}
    zeros, half = {"zeros": "block"}, {"a": "float16", "scales": "float16"}
    brain = {"a": "bfloat16", "scales": "bfloat16"}
    rich = {"bias": "channel", "activation": "silu", "residual": "after", "block": "128"}
    return (
        Case("one row, f16, blocks of 128", row, {"block": "128"}, half),
        Case("16 rows, f16, blocks of 128", row | {"M": 16}, {"block": "128"}, half),
        Case("64 rows, bf16, blocks of 32, zero points", row | {"M": 64}, zeros | {"out": "bfloat16"}, brain),
        Case("one row, bf16, blocks of 32, zero points", row, zeros, brain, full=True),
        Case("one row, few columns", row | {"N": 2048}, {"block": "128"}, half, full=True),
        Case("one row, blocks of 16", row, {"block": "16"} | zeros, half, full=True),
        Case("one row, 8 bits", row, {"bits": "8", "block": "128"}, half, full=True),
        Case("one row, nf4", row, {"bits": "nf4", "block": "64"}, half, full=True),
        Case("one row, bias, silu, residual", row, rich, half, full=True),
        Case("32 rows, 8 bits", row | {"M": 32}, {"bits": "8", "block": "128"}, half, full=True),
        Case("16 rows, nf4", row | {"M": 16}, {"bits": "nf4", "block": "64"}, half, full=True),
        Case("16 rows, bias, silu, residual", row | {"M": 16}, rich, half, full=True),
        Case("16 rows, blocks of 16", row | {"M": 16}, {"block": "16"} | zeros, half, full=True),
        Case("one row, K a multiple of 32", row | {"K": 11040}, {"block": "32"}, half, full=True),
        Case("16 rows, K a multiple of 32", row | {"M": 16, "K": 11040}, {"block": "32"}, half, full=True),
        Case("one row, ragged", {"M": 1, "N": 1001, "K": 1500}, zeros, half, full=True),
        Case("rows, ragged", {"M": 20, "N": 1001, "K": 1500}, zeros, half, full=True),
    )

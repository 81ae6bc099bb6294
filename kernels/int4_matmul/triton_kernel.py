"""``int4_matmul`` in Triton: one program per tile, or per tile and part of K; also the matrix path of ``int4_matvec``.

The byte j of a chunk of 16 holds the numbers j (low bits) and 16 + j: a tile of bytes gives two tiles of weights by
elementwise operations, without moving numbers between lanes, and each meets 16 contiguous activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.triton_kernel import finish
from qcompiler.kernels.int4_matmul.contract import weight_name
from qcompiler.kernels.operand import describe, strides


@triton.jit
def to_float(number, zero):
    """Return stored numbers less their zero points, exactly, as float32: put into the mantissa of 2**23, no I2F."""
    return (number.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def spread(values, WIDTH: tl.constexpr):
    """Repeat each column of [rows, columns] WIDTH times: [rows, columns * WIDTH]."""
    wide = tl.broadcast_to(values[:, :, None], (values.shape[0], values.shape[1], WIDTH))
    return tl.reshape(wide, (values.shape[0], values.shape[1] * WIDTH))


@triton.jit
def numbers(stored, zero, codebook_ptr, BITS: tl.constexpr, UPPER: tl.constexpr):
    """Return the lower or upper numbers of bytes less their zero points, or what the codebook has for them, in float32.

    Upper numbers stay where they are, times 16, which saves a shift: so do their zero points.
    """
    if BITS == "nf4":
        return tl.load(codebook_ptr + (stored >> 4 if UPPER else stored & 15).to(tl.int32))
    elif BITS == "8":
        return to_float(stored, zero)
    elif UPPER:
        return to_float(stored & 240, zero * 16.0)
    else:
        return to_float(stored & 15, zero)


@triton.jit
def half_weights(
    stored,
    scale_ptrs,
    zero_ptrs,
    mask,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    WIDTH: tl.constexpr,
    UPPER: tl.constexpr,
):
    """Return the same bits as `weights` where all is float16, in packed arithmetic: only the last product rounds."""
    scale = tl.load(scale_ptrs, mask=mask, other=0.0)
    zero = tl.full(scale_ptrs.shape, 128.0 if BITS == "8" else 8.0, tl.float16)
    if ZEROS == "block":
        zero = tl.load(zero_ptrs, mask=mask, other=0).to(tl.float16)
    # The mantissa of 1024 counts in ones; that of upper numbers in sixteens, so that 64 + number is left.
    if BITS == "4" and UPPER:
        number = ((stored & 240).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) * 0.0625
        number = number - spread(zero + 64.0, WIDTH)
    else:
        lower = stored if BITS == "8" else stored & 15
        number = (lower.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
        number = number - spread(zero + 1024.0, WIDTH)
    return number * spread(scale, WIDTH)


@triton.jit
def weights(
    stored,
    scale_ptrs,
    zero_ptrs,
    mask,
    codebook_ptr,
    BITS: tl.constexpr,
    ZEROS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    UPPER: tl.constexpr,
):
    """Return weights [columns, bytes] in DTYPE: (number - zero) * scale in float32, rounded once.

    Args:
        stored: bytes, of which the lower or upper numbers are taken.
        scale_ptrs: [columns, groups]; each is for WIDTH numbers.
        zero_ptrs: the same, of the zero points.
        mask: of both.
    """
    if BITS != "nf4" and tl.float16 == DTYPE and scale_ptrs.dtype.element_ty == tl.float16:
        return half_weights(stored, scale_ptrs, zero_ptrs, mask, BITS, ZEROS, WIDTH, UPPER)
    scale = tl.load(scale_ptrs, mask=mask, other=0.0).to(tl.float32)
    if UPPER and BITS == "4":
        scale = scale * 0.0625
    zero = 128.0 if BITS == "8" else 8.0
    if ZEROS == "block":
        zero = spread(tl.load(zero_ptrs, mask=mask, other=0).to(tl.float32), WIDTH)
    return (numbers(stored, zero, codebook_ptr, BITS, UPPER) * spread(scale, WIDTH)).to(DTYPE)


@triton.jit(do_not_specialize=["M", "residual_zero", "out_zero"])
def int4_matmul(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Compute one tile [BLOCK_M, BLOCK_N], or its share of a part of K."""
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    packed: tl.constexpr = BITS != "8"
    wide: tl.constexpr = BLOCK_K // 2 if packed else BLOCK_K
    # Numbers of one tile that share a scale, and how many such runs the tile has. Both halves of a chunk of 32 have
    # the same groups, but for blocks of 16: there they take turns.
    turns: tl.constexpr = 2 if packed and BLOCK == 16 else 1
    shared: tl.constexpr = BLOCK * turns if BLOCK * turns < BLOCK_K else BLOCK_K
    groups: tl.constexpr = BLOCK_K // shared
    width: tl.constexpr = wide // groups

    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    per_band = GROUP_M * tiles_n
    band = tl.program_id(0) // per_band
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    tile_m = band * GROUP_M + (tl.program_id(0) % per_band) % height
    tile_n = (tl.program_id(0) % per_band) // height

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    byte = tl.arange(0, wide)
    group = tl.arange(0, groups) * turns
    first_row = tile_m * BLOCK_M
    first_column = tile_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < N - first_column
    step = (byte // 16) * 32 + byte % 16 if packed else byte
    a_start = a_ptr + first_row.to(tl.int64) * stride_am
    w_start = w_ptr + first_column.to(tl.int64) * stride_w
    a_ptrs = a_start + (row[None, :] * stride_am + step[:, None] if SWAP else row[:, None] * stride_am + step[None, :])
    a_mask = row_mask[None, :] if SWAP else row_mask[:, None]
    w_ptrs = w_start + column[:, None] * stride_w + byte[None, :]
    all_groups = tl.cdiv(K, BLOCK)
    all_bytes = tl.cdiv(K, 32) * 16 if packed else tl.cdiv(K, 16) * 16

    part = tl.program_id(1)
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT) * BLOCK_K
    start = part * length
    total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, tl.minimum(K, start + length), BLOCK_K):
        at = (k // BLOCK) + group
        w_mask = column_mask[:, None]
        if EVEN_K:
            stored = tl.load(w_ptrs + (k // 2 if packed else k), mask=w_mask, other=0)
            low_mask = a_mask
            high_mask = a_mask
            low_groups = w_mask
            high_groups = w_mask
        else:
            known = byte < all_bytes - (k // 2 if packed else k)
            stored = tl.load(w_ptrs + (k // 2 if packed else k), mask=w_mask & known[None, :], other=0)
            low_step = step < K - k
            high_step = step + 16 < K - k
            low_mask = a_mask & (low_step[:, None] if SWAP else low_step[None, :])
            high_mask = a_mask & (high_step[:, None] if SWAP else high_step[None, :])
            low_groups = w_mask & (at < all_groups)[None, :]
            high_groups = w_mask & (at + turns - 1 < all_groups)[None, :]
        scale_ptrs = scales_ptr + at[None, :].to(tl.int64) * stride_s + first_column + column[:, None]
        zero_ptrs = scale_ptrs
        if ZEROS == "block":
            zero_ptrs = zeros_ptr + at[None, :].to(tl.int64) * stride_z + first_column + column[:, None]
        a = tl.load(a_ptrs + k, mask=low_mask, other=0.0)
        w = weights(stored, scale_ptrs, zero_ptrs, low_groups, codebook_ptr, BITS, ZEROS, width, dtype, False)
        total = tl.dot(w, a, total) if SWAP else tl.dot(a, tl.trans(w), total)
        if packed:
            if turns == 2:
                scale_ptrs += stride_s
                if ZEROS == "block":
                    zero_ptrs += stride_z
            a = tl.load(a_ptrs + (k + 16), mask=high_mask, other=0.0)
            w = weights(stored, scale_ptrs, zero_ptrs, high_groups, codebook_ptr, BITS, ZEROS, width, dtype, True)
            total = tl.dot(w, a, total) if SWAP else tl.dot(a, tl.trans(w), total)

    if SWAP:
        total = tl.trans(total)
    mask = row_mask[:, None] & column_mask[None, :]
    if SPLIT > 1:
        partial = partial_ptr + (part * M + first_row).to(tl.int64) * N + first_column
        tl.store(partial + row[:, None] * N + column[None, :], total, mask=mask)
    else:
        out_ptrs = out_ptr + first_row.to(tl.int64) * stride_om + first_column
        out_ptrs = out_ptrs + row[:, None] * stride_om + column[None, :]
        residual_ptrs = out_ptrs
        if RESIDUAL != "none":
            residual_ptrs = residual_ptr + first_row.to(tl.int64) * stride_rm + first_column
            residual_ptrs = residual_ptrs + row[:, None] * stride_rm + column[None, :]
        bias_ptrs = column
        if BIAS == "channel":
            bias_ptrs = bias_ptr + first_column + column
        result = finish(
            total,
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


def arguments_of(tensors: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the run-time arguments that the kernels on these weights share.

    Raises:
        TargetError: the chunks of a row of the weights do not follow each other.
    """
    a, out, residual, zeros = tensors["a"], tensors["out"], tensors.get("residual"), tensors.get("zeros")
    w = tensors[weight_name(options)]
    if describe(w).shape[1] > 1 and strides(w)[1] != 16:
        raise TargetError(f"chunks of the weights must follow each other; found strides {strides(w)}")
    rows, depth = describe(a).shape
    arguments = {
        "a_ptr": a,
        "w_ptr": w,
        "scales_ptr": tensors["scales"],
        "zeros_ptr": zeros,
        "codebook_ptr": tensors.get("codebook"),
        "bias_ptr": tensors.get("bias"),
        "residual_ptr": residual,
        "partial_ptr": tensors.get("partial"),
        "out_ptr": out,
        "M": rows,
        "N": describe(out).shape[1],
        "K": depth,
        "stride_am": strides(a)[0],
        "stride_w": strides(w)[0],
        "stride_s": strides(tensors["scales"])[0],
        "stride_z": 0 if zeros is None else strides(zeros)[0],
        "stride_om": strides(out)[0],
        "stride_rm": 0 if residual is None else strides(residual)[0],
    }
    numbers = ("low", "high", "residual_scale", "out_inverse")
    arguments |= {name: float(tensors.get(name, 0.0)) for name in numbers}
    return arguments | {name: int(tensors.get(name, 0)) for name in ("residual_zero", "out_zero")}


def product(tensors: Mapping[str, Any], options: Options, config: Config) -> Call:
    """Return the launch of the product on matrix units.

    Args:
        tensors: arguments by name, with ``out``, and ``partial`` if SPLIT is above 1.
        options: complete.
        config: with BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT and SWAP.
    """
    arguments = arguments_of(tensors, options)
    tiles = -(-arguments["M"] // config["BLOCK_M"]) * -(-arguments["N"] // config["BLOCK_N"])
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    constants["BLOCK"] = int(options["block"])
    constants["EVEN_K"] = arguments["K"] % config["BLOCK_K"] == 0
    return Call(int4_matmul, (tiles, config["SPLIT"], 1), arguments, constants | dict(config.tile), config)


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches of one product; there is one.

    Args:
        tensors: arguments by name, checked against the contract, with ``out``.
        options: complete.
        config: with BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT (1) and SWAP.
    """
    return [product(tensors, options, config)]


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every format and kind of epilogue once."""
    large = {"M": 1024, "N": 4096, "K": 4096}
    zeros, half = {"zeros": "block"}, {"a": "float16", "scales": "float16"}
    brain = {"a": "bfloat16", "scales": "bfloat16"}
    rich = {"bias": "channel", "activation": "silu", "residual": "after"}
    return (
        Case("f16, blocks of 128", large, {"block": "128"}, half),
        Case("bf16, blocks of 32, zero points", large, zeros | {"out": "bfloat16"}, brain),
        Case("f16, few rows", large | {"M": 128}, {"block": "128"}, half),
        *(Case(f"f16, blocks of {b}", large, {"block": b} | zeros, half, full=True) for b in ("16", "64", "256")),
        Case("8 bits", large, {"bits": "8", "block": "128"}, half, full=True),
        Case("nf4", large, {"bits": "nf4", "block": "64"}, half, full=True),
        Case("bias, silu, residual", large, rich | {"block": "128"}, half, full=True),
        Case("out int8", large, {"block": "128", "out": "int8"}, half, full=True),
        Case("ragged", large | {"M": 100, "N": 1001, "K": 1500}, zeros, half, full=True),
    )

"""``fp8_matmul`` in Triton: one program per tile of the output, pointers only, float32 sums in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.triton_kernel import finish
from qcompiler.kernels.operand import describe, strides


@triton.jit(do_not_specialize=["M", "residual_zero"])
def fp8_matmul(
    a_ptr,
    w_ptr,
    out_ptr,
    multiplier_ptr,
    w_scale_ptr,
    a_scale_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    stride_ab,
    stride_am,
    stride_wb,
    stride_wn,
    stride_sb,
    stride_sm,
    stride_sn,
    stride_ob,
    stride_om,
    stride_rb,
    stride_rm,
    scale,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    MULTIPLIER: tl.constexpr,
    A_SCALE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
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
):
    """Compute one tile [BLOCK_M, BLOCK_N] of one matrix of the batch."""
    batch = tl.program_id(1).to(tl.int64)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Bands of GROUP_M tiles share their weights in the cache.
    per_band = GROUP_M * tiles_n
    band = tl.program_id(0) // per_band
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    tile_m = band * GROUP_M + (tl.program_id(0) % per_band) % height
    tile_n = (tl.program_id(0) % per_band) // height

    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    first_row = tile_m * BLOCK_M
    first_column = tile_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < N - first_column
    a_ptrs = a_ptr + batch * stride_ab + first_row.to(tl.int64) * stride_am + row[:, None] * stride_am + step[None, :]
    w_start = w_ptr + batch * stride_wb + first_column.to(tl.int64) * stride_wn
    w_ptrs = w_start + column[None, :] * stride_wn + step[:, None]
    if MULTIPLIER == "block":
        tl.static_assert(BLOCK_K == 128 and 128 % BLOCK_N == 0, "a tile must lie in one block of w in each step")
        a_scale_ptrs = a_scale_ptr + batch * stride_sb + (first_row + row) * stride_sm
        w_scale_ptrs = w_scale_ptr + (first_column // 128) * stride_sn

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=column_mask[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_mask[:, None] & (step[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask=column_mask[None, :] & (step[:, None] < K - k), other=0.0)
        if MULTIPLIER == "block":
            a_scale = tl.load(a_scale_ptrs + k // BLOCK_K, mask=row_mask, other=0.0)
            w_scale = tl.load(w_scale_ptrs + k // BLOCK_K)
            total += tl.dot(a, w) * (a_scale * w_scale)[:, None]
        elif ACCUMULATE == "promoted":
            total = tl.dot(a, w, total, max_num_imprecise_acc=BLOCK_K)
        else:
            total = tl.dot(a, w, total)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if MULTIPLIER != "block":
        if MULTIPLIER == "channel":
            factor = tl.load(multiplier_ptr + first_column + column, mask=column_mask, other=0.0)[None, :]
        else:
            factor = scale
        if A_SCALE == "token":
            tokens = a_scale_ptr + batch * M + first_row + row
            factor = tl.load(tokens, mask=row_mask, other=0.0)[:, None] * factor
        elif A_SCALE == "tensor":
            factor = tl.load(a_scale_ptr) * factor
        total = total * factor

    mask = row_mask[:, None] & column_mask[None, :]
    out_ptrs = out_ptr + batch * stride_ob + first_row.to(tl.int64) * stride_om + first_column
    out_ptrs = out_ptrs + row[:, None] * stride_om + column[None, :]
    residual_ptrs = out_ptrs
    if RESIDUAL != "none":
        residual_ptrs = residual_ptr + batch * stride_rb + first_row.to(tl.int64) * stride_rm + first_column
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
        0,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        OUT_SCALE,
        OUT,
    )
    tl.store(out_ptrs, result, mask=mask)


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches of one product; there is one.

    Args:
        tensors: arguments by name, checked against the contract, with ``out``.
        options: complete.
        config: with BLOCK_M, BLOCK_N, BLOCK_K and GROUP_M.
    """
    a, w, out, residual = tensors["a"], tensors["w"], tensors["out"], tensors.get("residual")
    a_scale = next((tensors[n] for n in ("a_scale", "a_scale_one", "a_blocks") if n in tensors), None)
    batch, rows, depth = describe(a).shape
    columns = describe(out).shape[2]
    tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
    blocks = options["multiplier"] == "block"
    arguments: dict[str, Any] = {
        "a_ptr": a,
        "w_ptr": w,
        "out_ptr": out,
        "multiplier_ptr": tensors.get("multiplier"),
        "w_scale_ptr": tensors.get("w_scale"),
        "a_scale_ptr": a_scale,
        "bias_ptr": tensors.get("bias"),
        "residual_ptr": residual,
        "M": rows,
        "N": columns,
        "K": depth,
        "stride_ab": strides(a)[0],
        "stride_am": strides(a)[1],
        "stride_wb": 0 if describe(w).shape[0] == 1 else strides(w)[0],
        "stride_wn": strides(w)[1],
        "stride_sb": strides(a_scale)[0] if blocks else 0,
        "stride_sm": strides(a_scale)[1] if blocks else 0,
        "stride_sn": strides(tensors["w_scale"])[0] if blocks else 0,
        "stride_ob": strides(out)[0],
        "stride_om": strides(out)[1],
        "stride_rb": 0 if residual is None else strides(residual)[0],
        "stride_rm": 0 if residual is None else strides(residual)[1],
    }
    numbers = ("scale", "low", "high", "residual_scale", "out_inverse")
    arguments |= {name: float(tensors.get(name, 0.0)) for name in numbers}
    arguments["residual_zero"] = int(tensors.get("residual_zero", 0))
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    constants["EVEN_K"] = depth % config["BLOCK_K"] == 0
    constants |= dict(config.tile)
    return [Call(fp8_matmul, (tiles, batch, 1), arguments, constants, config)]


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, and every kind of scale and epilogue."""
    large = {"B": 1, "M": 4096, "N": 4096, "K": 4096, "W": 1}
    token = {"a_scale": "token"}
    blocks = {"multiplier": "block", "a_scale": "block"}
    return (
        Case("per row", large, token),
        Case("per block", large, blocks),
        Case("per row, gelu, f16", large | {"M": 512}, token | {"bias": "channel", "activation": "gelu", **F16}),
        Case("per row, one row", large | {"M": 16}, token),
        Case("per row, few rows", large | {"M": 64}, token, full=True),
        Case("per block, few rows", large | {"M": 64}, blocks, full=True),
        Case("per block, one row", large | {"M": 16}, blocks, full=True),
        Case("per tensor, promoted", large, {"multiplier": "scalar", "accumulate": "promoted"}, full=True),
        Case("residual", large, token | {"residual": "before", "out": "float32"}, full=True),
        Case("queries by keys", {"B": 96, "M": 512, "N": 512, "K": 64, "W": 96}, {"multiplier": "scalar"}, full=True),
        Case("out float8e4m3fn", large, {"out": "float8e4m3fn", "out_scale": "scalar"}, full=True),
        Case("ragged", large | {"M": 100, "N": 1001, "K": 147}, token, full=True),
        Case("ragged, per block", large | {"M": 100, "N": 1001, "K": 147}, blocks, full=True),
    )


F16 = {"out": "float16"}

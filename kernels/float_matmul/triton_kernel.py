"""``float_matmul`` in Triton: one program per tile of the output, pointers only, sums in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.triton_kernel import finish
from qcompiler.kernels.operand import describe, strides


@triton.jit(do_not_specialize=["M", "heads", "residual_zero", "out_zero"])
def float_matmul(
    a_ptr,
    w_ptr,
    out_ptr,
    bias_ptr,
    residual_ptr,
    M,
    N,
    K,
    stride_ab,
    stride_am,
    stride_wb,
    stride_w,
    stride_ob,
    stride_om,
    stride_rb,
    stride_rm,
    heads,
    stride_ag,
    stride_wg,
    stride_og,
    stride_rg,
    scale,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    W_LAYOUT: tl.constexpr,
    FACTOR: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    BATCH: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile [BLOCK_M, BLOCK_N] of one matrix of the batch."""
    batch = tl.program_id(1).to(tl.int64)
    if BATCH == "two":
        group = batch // heads
        a_ptr += group * stride_ag
        w_ptr += group * stride_wg
        out_ptr += group * stride_og
        if RESIDUAL != "none":
            residual_ptr += group * stride_rg
        batch = batch % heads
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Bands of GROUP_M tiles share their weights in the cache.
    per_band = GROUP_M * tiles_n
    band = tl.program_id(0) // per_band
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    tile_m = band * GROUP_M + (tl.program_id(0) % per_band) % height
    tile_n = (tl.program_id(0) % per_band) // height

    # Starts are 64-bit, offsets inside a tile 32-bit.
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    first_row = tile_m * BLOCK_M
    first_column = tile_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < N - first_column
    a_ptrs = a_ptr + batch * stride_ab + first_row.to(tl.int64) * stride_am + row[:, None] * stride_am + step[None, :]
    if W_LAYOUT == "nk":
        w_start = w_ptr + batch * stride_wb + first_column.to(tl.int64) * stride_w
        w_ptrs = w_start + column[None, :] * stride_w + step[:, None]
        w_step = BLOCK_K
    else:
        w_ptrs = w_ptr + batch * stride_wb + first_column + step[:, None] * stride_w + column[None, :]
        w_step = BLOCK_K * stride_w

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=column_mask[None, :], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=row_mask[:, None] & (step[None, :] < K - k), other=0.0)
            w = tl.load(w_ptrs, mask=column_mask[None, :] & (step[:, None] < K - k), other=0.0)
        total = tl.dot(a, w, total, input_precision="tf32")
        a_ptrs += BLOCK_K
        w_ptrs += w_step

    mask = row_mask[:, None] & column_mask[None, :]
    out_ptrs = out_ptr + batch * stride_ob + first_row.to(tl.int64) * stride_om + first_column
    out_ptrs = out_ptrs + row[:, None] * stride_om + column[None, :]
    if FACTOR == "scalar":
        total = total * scale
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
        out_zero,
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
    a, out, residual = tensors["a"], tensors["out"], tensors.get("residual")
    w = tensors["w"] if options["w_layout"] == "nk" else tensors["w_kn"]
    *batch, rows, depth = describe(a).shape
    columns = describe(out).shape[-1]
    tiles = -(-rows // config["BLOCK_M"]) * -(-columns // config["BLOCK_N"])
    arguments = {
        "a_ptr": a,
        "w_ptr": w,
        "out_ptr": out,
        "bias_ptr": tensors.get("bias"),
        "residual_ptr": residual,
        "M": rows,
        "N": columns,
        "K": depth,
        "stride_am": strides(a)[-2],
        "stride_w": strides(w)[-2],
        "stride_om": strides(out)[-2],
        "stride_rm": 0 if residual is None else strides(residual)[-2],
        "heads": batch[-1],
    }
    for letter, tensor in (("a", a), ("w", w), ("o", out), ("r", residual)):
        arguments[f"stride_{letter}b"], arguments[f"stride_{letter}g"] = batch_strides(tensor)
    numbers = ("scale", "low", "high", "residual_scale", "out_inverse")
    arguments |= {name: float(tensors.get(name, 0.0)) for name in numbers}
    arguments |= {name: int(tensors.get(name, 0)) for name in ("residual_zero", "out_zero")}
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    constants["EVEN_K"] = depth % config["BLOCK_K"] == 0
    return [Call(float_matmul, (tiles, math.prod(batch), 1), arguments, constants | dict(config.tile), config)]


def batch_strides(tensor: Any) -> tuple[int, int]:
    """Return how far apart the matrices of a batch lie along its last axis and along the one before; 0 if shared."""
    if tensor is None:
        return 0, 0
    found = [0 if length == 1 else step for length, step in zip(describe(tensor).shape, strides(tensor), strict=True)]
    return found[-3], found[-4] if len(found) == 4 else 0


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, and every kind of epilogue once."""
    large = {"B": 1, "M": 4096, "N": 4096, "K": 4096, "W": 1}
    tokens = {"G": 8, "H": 12, "WG": 8, "WH": 12, "M": 512, "N": 512, "K": 8}
    split = {"batch": "two"}
    scores = split | {"factor": "scalar"}
    values = split | {"w_layout": "kn"}
    rich = {"bias": "channel", "activation": "gelu", "residual": "after"}
    requantize = {"out": "int8", "out_scale": "scalar"}
    found = [
        Case("weights", large, {}),
        Case("scores of short heads", tokens, scores),
        Case("values of short heads", tokens | {"N": 8, "K": 512}, values),
        Case("few rows", large | {"M": 16}, {}),
        Case("few columns", large | {"N": 64}, {}, full=True),
        Case("ragged", large | {"M": 100, "N": 1001, "K": 147}, rich, full=True),
        Case("ragged values, heads", tokens | {"M": 65, "N": 32, "K": 65}, values | requantize, full=True),
        Case("second operand as (K, N)", large, {"w_layout": "kn"}, full=True),
        Case("bias, gelu, residual", large, rich, full=True),
        Case("requantize", large, requantize, full=True),
        *(Case(f"of {d}", large, {"out": d}, {"a": d, "w": d}, full=True) for d in ("float16", "bfloat16")),
    ]
    return tuple(found)

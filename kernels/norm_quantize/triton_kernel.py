"""``norm_quantize`` in Triton: one program holds ROWS whole rows in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.triton_kernel import round_to_integer, to_output
from qcompiler.kernels.operand import describe, strides


@triton.jit
def symmetric_scale(reach, OUT: tl.constexpr):
    """Return the scale that brings the largest magnitude to the end of the format; 1 for a row of zeros."""
    most: tl.constexpr = 448.0 if OUT == "float8e4m3fn" else 127.0
    scale = tl.maximum(tl.math.div_rn(reach, tl.full(reach.shape, most, tl.float32)), 1.1754943508222875e-38)
    return tl.where(reach > 0.0, scale, 1.0)


@triton.jit(do_not_specialize=["M", "zero"])
def norm_quantize(
    x_ptr,
    residual_ptr,
    gamma_ptr,
    beta_ptr,
    out_ptr,
    scales_ptr,
    zeros_ptr,
    kept_ptr,
    normed_ptr,
    M,
    N,
    stride_x,
    stride_residual,
    stride_out,
    stride_kept,
    stride_normed,
    length,
    eps,
    scale,
    zero,
    NORM: tl.constexpr,
    BETA: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ALSO: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Normalize and quantize ROWS rows."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_N)
    row_mask = row < M - first
    column_mask = column < N
    mask = row_mask[:, None] & column_mask[None, :]

    offsets = row[:, None] * stride_x + column[None, :]
    h = tl.load(x_ptr + first * stride_x + offsets, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL != "none":
        offsets = row[:, None] * stride_residual + column[None, :]
        h += tl.load(residual_ptr + first * stride_residual + offsets, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL == "keep":
        kept = h.to(kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + first * stride_kept + row[:, None] * stride_kept + column[None, :], kept, mask=mask)
        h = kept.to(tl.float32)

    if NORM != "none":
        lengths = tl.zeros((ROWS,), tl.float32) + length
        if NORM == "layer":
            h = tl.where(mask, h - tl.math.div_rn(tl.sum(h, 1), lengths)[:, None], 0.0)
        square = tl.math.div_rn(tl.sum(h * h, 1), lengths)
        factor = tl.math.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.math.sqrt_rn(square + eps))
        gamma = tl.load(gamma_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        h = h * factor[:, None] * gamma[None, :]
    if BETA == "channel":
        h += tl.load(beta_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        h = tl.where(mask, h, 0.0)
    if ALSO == "normed":
        normed = h.to(normed_ptr.dtype.element_ty)
        tl.store(normed_ptr + first * stride_normed + row[:, None] * stride_normed + column[None, :], normed, mask=mask)

    if SCALE == "none":
        result = to_output(h, 0, OUT)
    elif SCALE == "static":
        result = to_output(tl.math.div_rn(h, tl.zeros((ROWS, BLOCK_N), tl.float32) + scale), zero, OUT)
    elif SCALE == "group":
        grouped = tl.reshape(h, (ROWS, BLOCK_N // GROUP, GROUP))
        scales = symmetric_scale(tl.max(tl.abs(grouped), 2), OUT)
        group = tl.arange(0, BLOCK_N // GROUP)
        offsets = row[:, None] * (N // GROUP) + group[None, :]
        group_mask = row_mask[:, None] & (group[None, :] < N // GROUP)
        tl.store(scales_ptr + first * (N // GROUP) + offsets, scales, mask=group_mask)
        divisor = tl.broadcast_to(scales[:, :, None], (ROWS, BLOCK_N // GROUP, GROUP))
        result = to_output(tl.reshape(tl.math.div_rn(grouped, divisor), (ROWS, BLOCK_N)), 0, OUT)
    elif ZEROS == "token":
        low = tl.minimum(tl.min(h, 1), 0.0)
        high = tl.maximum(tl.max(h, 1), 0.0)
        scales = tl.maximum(tl.math.div_rn(high - low, tl.full((ROWS,), 255.0, tl.float32)), 1.1754943508222875e-38)
        scales = tl.where(high > low, scales, 1.0)
        zeros = round_to_integer(tl.math.div_rn(-low, scales), 0, 0, 255) - 128
        tl.store(scales_ptr + first + row, scales, mask=row_mask)
        tl.store(zeros_ptr + first + row, zeros, mask=row_mask)
        ratio = tl.math.div_rn(h, tl.broadcast_to(scales[:, None], (ROWS, BLOCK_N)))
        result = round_to_integer(ratio, zeros[:, None], -128, 127).to(tl.int8)
    else:
        scales = symmetric_scale(tl.max(tl.abs(h), 1), OUT)
        tl.store(scales_ptr + first + row, scales, mask=row_mask)
        result = to_output(tl.math.div_rn(h, tl.broadcast_to(scales[:, None], (ROWS, BLOCK_N))), 0, OUT)
    tl.store(out_ptr + first * stride_out + row[:, None] * stride_out + column[None, :], result, mask=mask)


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches; there is one.

    Args:
        tensors: arguments by name, checked against the contract, with the outputs.
        options: complete.
        config: with ROWS.
    """
    rows, columns = describe(tensors["x"]).shape
    named = {name: tensors.get(name) for name in ("x", "residual", "gamma", "beta", "out", "zeros", "kept", "normed")}
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in named.items()}
    arguments["scales_ptr"] = tensors.get("scales", tensors.get("group_scales"))
    arguments |= {"M": rows, "N": columns, "length": float(columns)}
    for name in ("x", "residual", "out", "kept", "normed"):
        arguments[f"stride_{name}"] = 0 if named[name] is None else strides(named[name])[0]
    arguments |= {"eps": float(tensors.get("eps", 0.0)), "scale": float(tensors.get("scale", 1.0))}
    arguments["zero"] = int(tensors.get("zero", 0))
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    group = int(options["group"]) if options["scale"] == "group" else 1
    constants |= {"GROUP": group, "ROWS": config["ROWS"], "BLOCK_N": max(triton.next_power_of_2(columns), group)}
    grid = (-(-rows // config["ROWS"]), 1, 1)
    # Quotients must round as the reference's: no contraction.
    return [Call(norm_quantize, grid, arguments, constants, config, fuse=False)]


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every norm and every kind of scale."""
    wide, dtypes = {"M": 16384, "N": 4096}, {"x": "bfloat16", "residual": "bfloat16"}
    rms = {"norm": "rms", "residual": "keep"}
    layer = {"norm": "layer", "beta": "channel", "also": "normed"}
    found = [
        Case("rms, per token", wide, rms, dtypes),
        Case("layer, per token, zero points", {"M": 4096, "N": 768}, layer | {"zeros": "token"}),
        Case("static", wide, {"scale": "static"}, {"x": "float32"}),
        Case("layer, 128 columns", {"M": 4096, "N": 128}, layer, full=True),
        Case("rms, 384 columns", {"M": 4096, "N": 384}, rms, full=True),
        Case("rms, 8192 columns", {"M": 8192, "N": 8192}, rms, dtypes, full=True),
        Case("layer, 16384 columns", {"M": 8192, "N": 16384}, layer, dtypes, full=True),
        Case("rms, 32768 columns", {"M": 8192, "N": 32768}, rms, dtypes, full=True),
        Case("rms, groups", wide, rms | {"scale": "group"}, dtypes, full=True),
        Case("rms, float", wide, rms | {"scale": "none", "out": "bfloat16"}, dtypes, full=True),
        Case("ragged", {"M": 100, "N": 577}, layer, full=True),
    ]
    if arch != "sm80":  # no conversion to 8-bit floats there
        found += [
            Case("rms, e4m3", wide, rms | {"out": "float8e4m3fn"}, dtypes),
            Case("groups, e4m3", wide, {"scale": "group", "out": "float8e4m3fn"}, dtypes, full=True),
        ]
    return tuple(found)

"""``int8_conv`` in Triton: one program per tile of pixels by channels, pointers only, integer sums in registers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.epilogue.contract import PIECEWISE
from qcompiler.kernels.int8_conv.tile.triton_kernel import banded_tile, store_tile, window_starts
from qcompiler.kernels.operand import describe, strides

GEOMETRY = ("stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left")
FREE = [*GEOMETRY, "M", "H", "W", "P", "Q", "S", "x_zero", "residual_zero", "out_zero"]
"""Arguments that are small numbers at run time: a 1 must not become a constant."""


@triton.jit(do_not_specialize=FREE)
def int8_conv(
    x_ptr,
    w_ptr,
    out_ptr,
    multiplier_ptr,
    offset_ptr,
    bias_ptr,
    residual_ptr,
    M,
    H,
    W,
    P,
    Q,
    S,
    channels,
    columns,
    depth,
    stored,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_out,
    stride_residual,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    pad_top,
    pad_left,
    x_zero,
    scale,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    PAD: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    ONE_TAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PADDED_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Compute one tile [BLOCK_M pixels, BLOCK_N channels] of one group.

    The reduced axis is (r, s, c) in one, ``depth`` long, ``stored`` channels per tap. With ONE_TAP every step of
    BLOCK_K lies in one tap, found once per step; otherwise every element finds its own.
    """
    group = tl.program_id(1)
    tile_m, tile_n = banded_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP_M)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    step = tl.arange(0, BLOCK_K)
    first_row = tile_m * BLOCK_M
    first_column = tile_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < columns - first_column

    # Starts are 64-bit, offsets inside a tile 32-bit: from the first picture that the tile touches.
    picture, top, left = window_starts(first_row + row, P, Q, stride_h, stride_w, pad_top, pad_left)
    first_picture = first_row // Q // P
    x_start = x_ptr + first_picture.to(tl.int64) * stride_xn + group * channels
    x_row = (picture - first_picture) * stride_xn + top * stride_xh + left * stride_xw
    first_weight = (group * columns + first_column).to(tl.int64)
    w_ptrs = w_ptr + first_weight * depth + column[None, :] * depth + step[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, depth, BLOCK_K):
        if ONE_TAP:
            tap = k // stored
            h = tap // S * dilation_h
            w = tap % S * dilation_w
            channel = k - tap * stored
            x_ptrs = x_start + x_row[:, None] + ((h * stride_xh + w * stride_xw + channel) + step)[None, :]
            mask = row_mask
            if PAD != "none":
                mask = mask & (top + h >= 0) & (top + h < H) & (left + w >= 0) & (left + w < W)
            mask = mask[:, None]
            if PADDED_C:
                mask = mask & (channel + step < channels)[None, :]
        else:
            tap = (k + step) // stored
            channel = k + step - tap * stored
            h = tap // S * dilation_h
            w = tap % S * dilation_w
            x_ptrs = x_start + x_row[:, None] + (h * stride_xh + w * stride_xw + channel)[None, :]
            mask = row_mask[:, None]
            if PAD != "none":
                mask = mask & (top[:, None] + h[None, :] >= 0) & (top[:, None] + h[None, :] < H)
                mask = mask & (left[:, None] + w[None, :] >= 0) & (left[:, None] + w[None, :] < W)
            if PADDED_C:
                mask = mask & (channel < channels)[None, :]
            if not EVEN_K:
                mask = mask & (step < depth - k)[None, :]
        if PAD == "point":
            x = tl.load(x_ptrs, mask=mask, other=x_zero.to(tl.int8))
        else:
            x = tl.load(x_ptrs, mask=mask, other=0)
        if EVEN_K:
            weight = tl.load(w_ptrs, mask=column_mask[None, :], other=0)
        else:
            weight = tl.load(w_ptrs, mask=column_mask[None, :] & (step[:, None] < depth - k), other=0)
        total = tl.dot(x, weight, total, out_dtype=tl.int32)
        w_ptrs += BLOCK_K

    store_tile(
        total,
        out_ptr,
        multiplier_ptr,
        offset_ptr,
        bias_ptr,
        residual_ptr,
        first_row,
        group * columns + first_column,
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
        MULTIPLIER,
        OFFSET,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        OUT_SCALE,
        OUT,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=FREE)
def int8_conv_depthwise(
    x_ptr,
    w_ptr,
    out_ptr,
    multiplier_ptr,
    offset_ptr,
    bias_ptr,
    residual_ptr,
    M,
    H,
    W,
    P,
    Q,
    S,
    columns,
    taps,
    stride_xn,
    stride_xh,
    stride_xw,
    stride_out,
    stride_residual,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    pad_top,
    pad_left,
    x_zero,
    scale,
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    PAD: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
    REPEAT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one tile [BLOCK_M pixels, BLOCK_N channels]; every channel of x serves REPEAT channels of out."""
    tiles_n = tl.cdiv(columns, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    first_column = tl.program_id(0) % tiles_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < columns - first_column
    picture, top, left = window_starts(first_row + row, P, Q, stride_h, stride_w, pad_top, pad_left)
    first_picture = first_row // Q // P
    x_start = x_ptr + first_picture.to(tl.int64) * stride_xn
    x_row = (picture - first_picture) * stride_xn + top * stride_xh + left * stride_xw
    channel = first_column + column
    if REPEAT > 1:
        channel = channel // REPEAT

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tap in tl.range(0, taps, loop_unroll_factor=3):
        h = tap // S * dilation_h
        w = tap % S * dilation_w
        mask = row_mask
        if PAD != "none":
            mask = mask & (top + h >= 0) & (top + h < H) & (left + w >= 0) & (left + w < W)
        mask = mask[:, None] & column_mask[None, :]
        x_ptrs = x_start + x_row[:, None] + (h * stride_xh + w * stride_xw + channel)[None, :]
        if PAD == "point":
            x = tl.load(x_ptrs, mask=mask, other=x_zero.to(tl.int8))
        else:
            x = tl.load(x_ptrs, mask=mask, other=0)
        weight = tl.load(w_ptr + tap * columns + first_column + column, mask=column_mask, other=0)
        total += x.to(tl.int32) * weight.to(tl.int32)[None, :]

    store_tile(
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
        MULTIPLIER,
        OFFSET,
        BIAS,
        RESIDUAL,
        ACTIVATION,
        OUT_SCALE,
        OUT,
        BLOCK_M,
        BLOCK_N,
    )


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches of one convolution; there is one.

    Args:
        tensors: arguments by name, checked against the contract, with ``out``.
        options: complete.
        config: with BLOCK_M, BLOCK_N, BLOCK_K and GROUP_M; depthwise takes the first two.

    Raises:
        TargetError: the pictures are too large for offsets of 32 bits inside a tile.
    """
    pictures, places, outputs = _places(tensors)
    _check_offsets(pictures["stride_xn"], places["P"] * places["Q"], config["BLOCK_M"])
    arguments = _arguments(tensors) | pictures | places
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items() if name != "kind"}
    tiles_m = -(-places["M"] // config["BLOCK_M"])
    # Bit-exact results forbid contraction; curves have their own error, and profit from it.
    fuse = options["activation"] not in PIECEWISE
    if options["kind"] == "depthwise":
        height, width, _ = describe(tensors["w_rso"]).shape
        channels = describe(tensors["x"]).shape[3]
        arguments |= {"w_ptr": tensors["w_rso"], "S": width, "taps": height * width, "columns": outputs}
        constants |= {"REPEAT": outputs // channels, **{n: config[n] for n in ("BLOCK_M", "BLOCK_N")}}
        grid = (tiles_m * -(-outputs // config["BLOCK_N"]), 1, 1)
        return [Call(int8_conv_depthwise, grid, arguments, constants, config, fuse)]
    group = int(tensors["group"])
    _, height, width, stored = describe(tensors["w"]).shape
    channels, columns = describe(tensors["x"]).shape[3] // group, outputs // group
    depth = height * width * stored
    arguments |= {"w_ptr": tensors["w"], "S": width, "channels": channels, "columns": columns}
    arguments |= {"depth": depth, "stored": stored}
    constants |= {"ONE_TAP": stored % config["BLOCK_K"] == 0, "EVEN_K": depth % config["BLOCK_K"] == 0}
    constants |= {"PADDED_C": stored != channels, **dict(config.tile)}
    grid = (tiles_m * -(-columns // config["BLOCK_N"]), group, 1)
    return [Call(int8_conv, grid, arguments, constants, config, fuse)]


def _places(tensors: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int], int]:
    """Return strides of x, lengths of the pictures, and how many channels ``out`` has."""
    _, height, width, _ = describe(tensors["x"]).shape
    count, rows, places, outputs = describe(tensors["out"]).shape
    steps = strides(tensors["x"])
    pictures = {"stride_xn": steps[0], "stride_xh": steps[1], "stride_xw": steps[2]}
    return pictures, {"M": count * rows * places, "H": height, "W": width, "P": rows, "Q": places}, outputs


def _check_offsets(stride: int, pixels: int, block: int) -> None:
    touched = block // max(pixels, 1) + 2
    if stride * touched >= 2**31:
        raise TargetError(
            f"int8_conv: a tile touches up to {touched} pictures of {stride} numbers, and offsets inside it are of 32 "
            f"bits; expected fewer than {2**31 // touched} numbers per picture, or smaller tiles"
        )


def _arguments(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run-time arguments that both kernels have in common."""
    residual = tensors.get("residual")
    pointers = ("x", "out", "multiplier", "offset", "bias", "residual")
    arguments: dict[str, Any] = {f"{name}_ptr": tensors.get(name) for name in pointers}
    arguments["stride_out"] = strides(tensors["out"])[2]
    arguments["stride_residual"] = 0 if residual is None else strides(residual)[2]
    arguments |= {name: int(tensors[name]) for name in GEOMETRY}
    numbers = ("scale", "low", "high", "residual_scale", "out_inverse")
    arguments |= {name: float(tensors.get(name, 0.0)) for name in numbers}
    return arguments | {name: int(tensors.get(name, 0)) for name in ("x_zero", "residual_zero", "out_zero")}


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every padding and kind of epilogue."""
    large = {"N": 64, "H": 28, "W": 28, "P": 28, "Q": 28, "C": 128, "D": 128, "O": 128, "R": 3, "S": 3}
    point = {"C": 256, "D": 256, "O": 1024, "R": 1, "S": 1, "P": 28, "Q": 28}
    small = {"N": 1, "H": 7, "W": 7, "P": 7, "Q": 7, "C": 512, "D": 512, "O": 512}
    folded = {"offset": "channel", "activation": "relu", "pad": "zero"}
    residual = folded | {"residual": "before", "pad": "none"}
    depthwise = folded | {"kind": "depthwise", "pad": "point"}
    first = {"H": 224, "W": 224, "P": 224, "Q": 224, "C": 3, "D": 3, "O": 64}
    found = [
        Case("3x3, zero", large, folded),
        Case("3x3, zero point", large, folded | {"pad": "point"}),
        Case("1x1, residual s8", large | point, residual, {"residual": "int8"}),
        Case("depthwise", large, depthwise),
        Case("few pixels", large | small, folded, full=True),
        Case("few channels", large | {"C": 16, "D": 16, "O": 16}, folded, full=True),
        Case("few channels, zero point", large | {"C": 32, "D": 32, "O": 32}, folded | {"pad": "point"}, full=True),
        Case("64 channels", large | {"C": 64, "D": 64, "O": 64}, folded, full=True),
        Case("96 channels", large | {"C": 96, "D": 96, "O": 96}, folded, full=True),
        Case("first layer", large | first, folded, full=True),
        Case("first layer, 16 channels", large | first | {"C": 16, "D": 16}, folded, full=True),
        Case("silu, f16", large, {"activation": "silu", "bias": "channel", "out": "float16"}, full=True),
        Case("plain sum", large, {"multiplier": "none", "out": "int32"}, full=True),
        Case("depthwise, few channels", large | {"C": 16, "O": 16}, depthwise, full=True),
        Case("depthwise, ragged", large | {"C": 30, "O": 60}, depthwise, full=True),
    ]
    found += [Case(f"out {out}", large, {"out": out}, full=True) for out in ("uint8", "bfloat16", "float32")]
    return tuple(found)

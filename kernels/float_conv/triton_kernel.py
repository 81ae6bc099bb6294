"""``float_conv`` in Triton: one program per tile of pixels by channels, pointers only, sums in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options
from qcompiler.kernels.int8_conv.tile.triton_kernel import banded_tile, store_tile, window_starts
from qcompiler.kernels.operand import describe, strides

GEOMETRY = ("stride_h", "stride_w", "dilation_h", "dilation_w", "pad_top", "pad_left")
FREE = [*GEOMETRY, "M", "H", "W", "P", "Q", "S", "residual_zero", "out_zero"]
"""Arguments that are small numbers at run time: a 1 must not become a constant."""


@triton.jit(do_not_specialize=FREE)
def float_conv(
    x_ptr,
    w_ptr,
    out_ptr,
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
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    PAD: tl.constexpr,
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

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
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
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        if EVEN_K:
            weight = tl.load(w_ptrs, mask=column_mask[None, :], other=0.0)
        else:
            weight = tl.load(w_ptrs, mask=column_mask[None, :] & (step[:, None] < depth - k), other=0.0)
        total = tl.dot(x, weight, total, input_precision="tf32")
        w_ptrs += BLOCK_K

    store_tile(
        total,
        out_ptr,
        out_ptr,
        out_ptr,
        bias_ptr,
        residual_ptr,
        first_row,
        group * columns + first_column,
        row_mask,
        column_mask,
        stride_out,
        stride_residual,
        1.0,
        low,
        high,
        residual_scale,
        residual_zero,
        out_inverse,
        out_zero,
        "none",
        "none",
        BIAS,
        RESIDUAL,
        ACTIVATION,
        OUT_SCALE,
        OUT,
        BLOCK_M,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=FREE)
def float_conv_depthwise(
    x_ptr,
    w_ptr,
    out_ptr,
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
    low,
    high,
    residual_scale,
    residual_zero,
    out_inverse,
    out_zero,
    PAD: tl.constexpr,
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

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.range(0, taps, loop_unroll_factor=3):
        h = tap // S * dilation_h
        w = tap % S * dilation_w
        mask = row_mask
        if PAD != "none":
            mask = mask & (top + h >= 0) & (top + h < H) & (left + w >= 0) & (left + w < W)
        mask = mask[:, None] & column_mask[None, :]
        x_ptrs = x_start + x_row[:, None] + (h * stride_xh + w * stride_xw + channel)[None, :]
        x = tl.load(x_ptrs, mask=mask, other=0.0)
        weight = tl.load(w_ptr + tap * columns + first_column + column, mask=column_mask, other=0.0)
        total += x.to(tl.float32) * weight.to(tl.float32)[None, :]

    store_tile(
        total,
        out_ptr,
        out_ptr,
        out_ptr,
        bias_ptr,
        residual_ptr,
        first_row,
        first_column,
        row_mask,
        column_mask,
        stride_out,
        stride_residual,
        1.0,
        low,
        high,
        residual_scale,
        residual_zero,
        out_inverse,
        out_zero,
        "none",
        "none",
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
    if options["kind"] == "depthwise":
        height, width, _ = describe(tensors["w_rso"]).shape
        channels = describe(tensors["x"]).shape[3]
        arguments |= {"w_ptr": tensors["w_rso"], "S": width, "taps": height * width, "columns": outputs}
        constants |= {"REPEAT": outputs // channels, **{n: config[n] for n in ("BLOCK_M", "BLOCK_N")}}
        grid = (tiles_m * -(-outputs // config["BLOCK_N"]), 1, 1)
        return [Call(float_conv_depthwise, grid, arguments, constants, config)]
    group = int(tensors["group"])
    _, height, width, stored = describe(tensors["w"]).shape
    channels, columns = describe(tensors["x"]).shape[3] // group, outputs // group
    depth = height * width * stored
    arguments |= {"w_ptr": tensors["w"], "S": width, "channels": channels, "columns": columns}
    arguments |= {"depth": depth, "stored": stored}
    constants |= {"ONE_TAP": stored % config["BLOCK_K"] == 0, "EVEN_K": depth % config["BLOCK_K"] == 0}
    constants |= {"PADDED_C": stored != channels, **dict(config.tile)}
    grid = (tiles_m * -(-columns // config["BLOCK_N"]), group, 1)
    return [Call(float_conv, grid, arguments, constants, config)]


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
            f"float_conv: a tile touches up to {touched} pictures of {stride} numbers, and offsets inside it are of 32 "
            f"bits; expected fewer than {2**31 // touched} numbers per picture, or smaller tiles"
        )


def _arguments(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run-time arguments that both kernels have in common."""
    residual = tensors.get("residual")
    pointers = ("x", "out", "bias", "residual")
    arguments: dict[str, Any] = {f"{name}_ptr": tensors.get(name) for name in pointers}
    arguments["stride_out"] = strides(tensors["out"])[2]
    arguments["stride_residual"] = 0 if residual is None else strides(residual)[2]
    arguments |= {name: int(tensors[name]) for name in GEOMETRY}
    numbers = ("low", "high", "residual_scale", "out_inverse")
    arguments |= {name: float(tensors.get(name, 0.0)) for name in numbers}
    return arguments | {name: int(tensors.get(name, 0)) for name in ("residual_zero", "out_zero")}


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every padding and kind of epilogue."""
    large = {"N": 64, "H": 28, "W": 28, "P": 28, "Q": 28, "C": 128, "D": 128, "O": 128, "R": 3, "S": 3}
    point = {"C": 256, "D": 256, "O": 1024, "R": 1, "S": 1}
    biased = {"bias": "channel", "activation": "silu", "pad": "zero"}
    requantize = biased | {"out": "int8", "out_scale": "scalar"}
    depthwise = biased | {"kind": "depthwise"}
    first = {"H": 224, "W": 224, "P": 224, "Q": 224, "C": 3, "D": 3, "O": 64}
    found = [
        Case("3x3, silu", large, biased),
        Case("3x3, requantize", large, requantize),
        Case("1x1, residual", large | point, {"pad": "none", "residual": "after", "bias": "channel"}),
        Case("depthwise", large, depthwise),
        Case("64 channels", large | {"C": 64, "D": 64, "O": 64}, biased, full=True),
        Case("first layer", large | first, biased, full=True),
        Case("ragged", large | {"C": 30, "D": 30, "O": 85}, requantize, full=True),
        Case("depthwise, ragged", large | {"C": 30, "O": 60}, depthwise, full=True),
        *(Case(f"of {d}", large, {"out": d}, {"x": d, "w": d}, full=True) for d in ("float16", "bfloat16")),
    ]
    return tuple(found)

"""The epilogue on a tile of scaled sums in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) of a float32 tile."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, low, high, ACTIVATION: tl.constexpr):
    """Apply an activation to a float32 tile; see ``ACTIVATIONS``."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "clip":
        x = tl.minimum(tl.maximum(x, low), high)
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x < 0.0, x * low, x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        x = sigmoid(x)
    elif ACTIVATION == "tanh":
        x = 2.0 * sigmoid(2.0 * x) - 1.0
    elif ACTIVATION == "hard_swish":
        x = x * tl.minimum(tl.maximum(x * 0.16666666666666666 + 0.5, 0.0), 1.0)
    return x


@triton.jit
def round_to_integer(x, zero, least: tl.constexpr, most: tl.constexpr):
    """Return saturate(rint(x) + zero) as int32, ties to even.

    Clamped first: adding and subtracting 1.5 * 2**23 then rounds exactly, and no product before it can be contracted
    with the sum, which would round other ties.
    """
    shift = tl.cast(zero, tl.float32)  # zero may be a constant of the caller
    x = tl.minimum(tl.maximum(x, least - shift), most - shift)
    return ((x + 12582912.0) - 12582912.0).to(tl.int32) + zero


@triton.jit
def to_output(x, zero, OUT: tl.constexpr):
    """Round a float32 tile to the output dtype ``OUT``; 8-bit ones saturate."""
    if OUT == "int8":
        return round_to_integer(x, zero, -128, 127).to(tl.int8)
    elif OUT == "uint8":
        return round_to_integer(x, zero, 0, 255).to(tl.uint8)
    elif OUT == "float8e4m3fn":
        return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)
    elif OUT == "float16":
        return x.to(tl.float16)
    elif OUT == "bfloat16":
        return x.to(tl.bfloat16)
    else:
        return x


@triton.jit
def finish(
    x,
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
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    OUT: tl.constexpr,
):
    """Turn a float32 tile [rows, columns] of scaled sums into the output's dtype; the caller stores it."""
    if BIAS == "channel":
        x += tl.load(bias_ptrs, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL != "none":
        residual = tl.load(residual_ptrs, mask=mask, other=0).to(tl.float32)
        residual = (residual - tl.cast(residual_zero, tl.float32)) * residual_scale
        if RESIDUAL == "before":
            x += residual
    x = activate(x, low, high, ACTIVATION)
    if RESIDUAL == "after":
        x += residual
    if OUT_SCALE == "scalar":
        x = x * out_inverse
    return to_output(x, out_zero, OUT)

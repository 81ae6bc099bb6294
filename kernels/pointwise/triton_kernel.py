"""``pointwise`` in Triton: one program per tile of rows by columns, or of a flat tensor where nothing is broadcast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton
import triton.language as tl

from qcompiler.errors import TargetError
from qcompiler.kernels.call import Call, Case
from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Options, operands_only
from qcompiler.kernels.epilogue.contract import PIECEWISE
from qcompiler.kernels.epilogue.triton_kernel import activate, to_output
from qcompiler.kernels.operand import describe, strides
from qcompiler.kernels.pointwise.contract import QUANTIZED, shapes_of, tile_call


@triton.jit
def load_real(
    ptr,
    offset,
    first_row,
    first_column,
    row,
    column,
    row_mask,
    column_mask,
    N,
    zero,
    scale,
    MODE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Load what a tile takes of an operand, as real numbers that broadcast to the tile."""
    if MODE == "full":
        start = ptr + offset + first_row * N + first_column
        mask = row_mask[:, None] & column_mask[None, :]
        stored = tl.load(start + row[:, None] * N + column[None, :], mask=mask, other=0)
    elif MODE == "columns":
        stored = tl.load(ptr + offset + first_column + column, mask=column_mask, other=0)[None, :]
    elif MODE == "rows":
        stored = tl.load(ptr + offset + first_row + row, mask=row_mask, other=0)[:, None]
    else:
        stored = tl.load(ptr + offset)
    real = stored.to(tl.float32) - tl.cast(zero, tl.float32)
    if WIDE:
        return real.to(tl.float64) * tl.cast(scale, tl.float64)
    else:
        return real * scale


@triton.jit
def combine(first, second, OP: tl.constexpr):
    """Apply one operator to real numbers."""
    if OP == "add":
        return first + second
    elif OP == "sub":
        return first - second
    else:
        return first * second


@triton.jit
def round_wide(x, zero, least: tl.constexpr, most: tl.constexpr):
    """Return saturate(rint(x) + zero) of float64 as int32, ties to even; see ``round_to_integer``."""
    shift = tl.cast(zero, tl.float64)
    x = tl.minimum(tl.maximum(x, least - shift), most - shift)
    return ((x + 6755399441055744.0) - 6755399441055744.0).to(tl.int32) + zero


@triton.jit
def activate_wide(x, low, high, ACTIVATION: tl.constexpr):
    """Apply a piecewise linear activation to float64."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "clip":
        x = tl.minimum(tl.maximum(x, tl.cast(low, tl.float64)), tl.cast(high, tl.float64))
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x < 0.0, x * tl.cast(low, tl.float64), x)
    return x


@triton.jit(do_not_specialize=["a_zero", "b_zero", "c_zero", "out_zero", "M"])
def pointwise(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    M,
    N,
    step_b,
    step_c,
    a_scale,
    a_zero,
    b_scale,
    b_zero,
    c_scale,
    c_zero,
    low,
    high,
    out_scale,
    out_inverse,
    out_zero,
    OP: tl.constexpr,
    THIRD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    OUT: tl.constexpr,
    STORED: tl.constexpr,
    B_MODE: tl.constexpr,
    C_MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute one tile [BLOCK_M, BLOCK_N] of one matrix of the batch."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    batch = program // tiles_n // tiles_m
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    # Starts are 64-bit, offsets inside a tile 32-bit: a tile of several rows holds whole rows.
    first_row = program // tiles_n % tiles_m * BLOCK_M
    first_column = program % tiles_n * BLOCK_N
    row_mask = row < M - first_row
    column_mask = column < N - first_column
    wide: tl.constexpr = ARITHMETIC == "float64"
    matrix = batch * M * N

    x = load_real(
        a_ptr, matrix, first_row, first_column, row, column, row_mask, column_mask, N, a_zero, a_scale, "full", wide
    )
    if OP != "convert":
        x = combine(
            x,
            load_real(
                b_ptr,
                batch * step_b,
                first_row,
                first_column,
                row,
                column,
                row_mask,
                column_mask,
                N,
                b_zero,
                b_scale,
                B_MODE,
                wide,
            ),
            OP,
        )
    if THIRD != "none":
        x = combine(
            x,
            load_real(
                c_ptr,
                batch * step_c,
                first_row,
                first_column,
                row,
                column,
                row_mask,
                column_mask,
                N,
                c_zero,
                c_scale,
                C_MODE,
                wide,
            ),
            THIRD,
        )
    if wide:
        x = activate_wide(x, low, high, ACTIVATION) / tl.cast(out_scale, tl.float64)
        if OUT == "int8":
            result = round_wide(x, out_zero, -128, 127).to(tl.int8)
        else:
            result = round_wide(x, out_zero, 0, 255).to(tl.uint8)
    else:
        x = activate(x, low, high, ACTIVATION)
        if ARITHMETIC == "fast":
            x = x * out_inverse  # 1 for float outputs
        elif STORED:
            x = tl.math.div_rn(x, tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + out_scale)
        result = to_output(x, out_zero, OUT)
    out_ptrs = out_ptr + matrix + first_row * N + first_column + row[:, None] * N + column[None, :]
    tl.store(out_ptrs, result, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def pointwise_table(x_ptr, table_ptr, out_ptr, size, LEAST: tl.constexpr, BLOCK: tl.constexpr):
    """Look up BLOCK numbers; the table stays in the first cache."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, BLOCK)
    mask = place < size - first
    x = tl.load(x_ptr + first + place, mask=mask, other=0).to(tl.int32)
    tl.store(out_ptr + first + place, tl.load(table_ptr + (x - LEAST), mask=mask, other=0), mask=mask)


def calls(tensors: Mapping[str, Any], options: Options, config: Config) -> list[Call]:
    """Return the launches; there is one.

    Args:
        tensors: arguments by name, checked against the contract, with ``out``.
        options: complete.
        config: with BLOCK, numbers per program.

    Raises:
        TargetError: a tensor has gaps.
    """
    operands = {name: describe(tensor) for name, tensor in operands_only(tensors).items()}
    for name, operand in operands.items():
        if operand.size and any(
            n > 1 and found != wanted
            for n, found, wanted in zip(operand.shape, strides(tensors[name]), strides(operand), strict=True)
        ):
            raise TargetError(f"pointwise: {name} must have no gaps; found strides {strides(tensors[name])}")
    block = config["BLOCK"]
    if options["op"] == "table":
        size = operands["x"].size
        least = -128 if operands["x"].dtype == "int8" else 0
        arguments = {"x_ptr": tensors["x"], "table_ptr": tensors["table"], "out_ptr": tensors["out"], "size": size}
        return [Call(pointwise_table, (-(-size // block), 1, 1), arguments, {"LEAST": least, "BLOCK": block}, config)]
    shape, others = shapes_of(operands)
    tiling = tile_call(shape, others, block)
    arguments = {f"{name}_ptr": tensors.get(name) for name in ("a", "b", "c", "out")}
    arguments |= {"M": tiling.shape[1], "N": tiling.shape[2]}
    arguments |= {f"step_{name}": tiling.steps.get(name, 0) for name in "bc"}
    numbers = ("a_scale", "b_scale", "c_scale", "low", "high")
    # Rounded here, since the interpreter keeps Python's float64, where a device gets float32.
    arguments |= {name: float(np.float32(tensors.get(name, 0.0))) for name in numbers}
    arguments |= {name: int(tensors.get(name, 0)) for name in ("a_zero", "b_zero", "c_zero", "out_zero")}
    scale = np.float32(tensors.get("out_scale", 1.0))
    arguments |= {"out_scale": float(scale), "out_inverse": float(np.float32(1) / scale)}
    constants: dict[str, Any] = {name.upper(): value for name, value in options.items()}
    constants |= {f"{name.upper()}_MODE": tiling.modes.get(name, "one") for name in "bc"}
    constants["STORED"] = options["out"] in QUANTIZED
    constants |= {"BLOCK_M": tiling.block[0], "BLOCK_N": tiling.block[1]}
    # Bit-exact results forbid contraction; curves have their own error, and profit from it.
    fuse = options["activation"] not in PIECEWISE
    return [Call(pointwise, (tiling.programs, 1, 1), arguments, constants, config, fuse)]


def cases(arch: str) -> tuple[Case, ...]:
    """Return what is compiled ahead of time: every entry of the table, every operation and kind of operand."""
    same = {"P": 1, "M": 8192, "N": 8192} | {name + axis: 8192 for name in "BC" for axis in "MN"} | {"BP": 1, "CP": 1}
    channel = {"P": 64, "M": 3136, "N": 256, "BP": 1, "BM": 1, "BN": 256}
    pictures = {"P": 64, "M": 256, "N": 3136, "BP": 64, "BM": 256, "BN": 1}
    one = {"BM": 1, "BN": 1}
    quantize, dequantize = {"op": "convert"}, {"op": "convert", "out": "float16"}
    found = [
        Case("add", same, {"arithmetic": "fast", "activation": "relu"}),
        Case("table", same, {"op": "table"}),
        Case("quantize", same, quantize, {"a": "float32"}),
        Case("multiply per channel", channel, {"op": "mul"}),
        Case("add, divide", same, full=True),
        Case("add, float64", same, {"arithmetic": "float64"}, full=True),
        Case("add three", same, {"third": "add", "arithmetic": "fast"}, full=True),
        Case("multiply per picture and channel", pictures, {"op": "mul", "arithmetic": "fast"}, full=True),
        Case("multiply by one number", same | one, {"op": "mul", "arithmetic": "fast"}, full=True),
        Case("requantize", same, quantize | {"arithmetic": "fast"}, full=True),
        Case("dequantize", same, dequantize, full=True),
        Case("silu", same, quantize | {"activation": "silu"}, {"a": "bfloat16"}, full=True),
        Case("table to f16", same, {"op": "table", "out": "float16"}, full=True),
        Case("ragged", channel | {"N": 30, "BN": 30}, full=True),
    ]
    return tuple(found)

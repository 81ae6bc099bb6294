"""Contract of ``fp8_matmul``: out[b, m, n] = epilogue(sum_k a[b, m, k] * w[b, n, k] * scales).

Both operands are float8e4m3fn, weights packed to (N, K). Products are exact, sums are float32; on sm90 the tensor cores
keep about 14 bits of a sum of one instruction, which ``accumulate promoted`` adds up in float32 every BLOCK_K terms.
Scales of blocks are one per row of ``a`` and 128 columns of K, and one per 128 x 128 block of ``w``; each 128 terms are
summed, scaled, and added in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic
from qcompiler.kernels.epilogue.contract import (
    EPILOGUE_CHOICES,
    EPILOGUE_SCALARS,
    MOST_MATRICES,
    RESIDUAL_DTYPES,
    epilogue_rule,
)
from qcompiler.kernels.operand import ITEMSIZE, Operand

SCALE_BLOCK = 128
"""Columns of K, and rows of w, that share a block scale."""


def _macs(dims: Dims, options: Options) -> int:
    return dims["B"] * dims["M"] * dims["N"] * dims["K"]


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    batch, rows, columns, depth = (dims[d] for d in "BMNK")
    tiles_m, tiles_n = -(-rows // config["BLOCK_M"]), -(-columns // config["BLOCK_N"])
    steps = -(-depth // config["BLOCK_K"])
    read = rows * depth * tiles_n + columns * depth * tiles_m
    read += {"channel": 4 * columns * tiles_m, "block": 4 * steps * tiles_m * tiles_n}.get(options["multiplier"], 0)
    by_scale = {"token": rows * tiles_n, "tensor": tiles_m * tiles_n, "block": rows * steps * tiles_n}
    read += 4 * by_scale.get(options["a_scale"], 0)
    if options["bias"] == "channel":
        read += ITEMSIZE[operands["bias"].dtype] * columns * tiles_m
    if options["residual"] != "none":
        read += rows * columns * ITEMSIZE[operands["residual"].dtype]
    macs = tiles_m * config["BLOCK_M"] * tiles_n * config["BLOCK_N"] * steps * config["BLOCK_K"]
    return Traffic(batch * read, batch * rows * columns * ITEMSIZE[options["out"]], batch * macs)


def _batch_rule(dims: Dims, options: Options) -> str | None:
    if dims["B"] > MOST_MATRICES:
        return f"a batch may have {MOST_MATRICES} matrices; found {dims['B']}"
    if dims["W"] not in (1, dims["B"]):
        return f"w must have one matrix, or one for each of the {dims['B']} of a; found {dims['W']}"
    if options["multiplier"] == "block" and dims["W"] != 1:
        return f"block scales are for one matrix of weights; found {dims['W']}"
    return None


def _block_rule(dims: Dims, options: Options) -> str | None:
    if (options["multiplier"] == "block") != (options["a_scale"] == "block"):
        return (
            f"block scales are on both sides or on none; found multiplier {options['multiplier']} and "
            f"a_scale {options['a_scale']}"
        )
    return None


CONTRACT = Contract(
    name="fp8_matmul",
    purpose="e4m3 x e4m3 matrix product with scales and a fused epilogue",
    arguments=(
        Argument("a", ("float8e4m3fn",), ("B", "M", "K"), why="activations"),
        Argument("w", ("float8e4m3fn",), ("W", "N", "K"), why="weights, packed to (N, K)"),
        Argument("multiplier", ("float32",), ("N",), when=("multiplier", ("channel",)), why="scale of each channel"),
        Argument("scale", ("float32",), role="scalar", when=("multiplier", ("scalar",)), why="the same for all"),
        Argument("w_scale", ("float32",), ("N/128", "K/128"), when=("multiplier", ("block",)), why="block scales of w"),
        Argument("a_scale", ("float32",), ("B", "M"), when=("a_scale", ("token",)), packed=True, why="dynamic scales"),
        Argument("a_scale_one", ("float32",), (), when=("a_scale", ("tensor",)), why="the dynamic scale"),
        Argument("a_blocks", ("float32",), ("B", "M", "K/128"), when=("a_scale", ("block",)), why="block scales of a"),
        Argument("bias", ("float32", "float16"), ("N",), when=("bias", ("channel",)), why="float bias"),
        Argument("residual", RESIDUAL_DTYPES, ("B", "M", "N"), when=("residual", ("before", "after")), why="to add"),
        *(a for a in EPILOGUE_SCALARS if a.name != "out_zero"),
        Argument("out", (), ("B", "M", "N"), role="output", dtype_of="out", why="result"),
    ),
    choices=(
        Choice("multiplier", ("channel", "scalar", "block"), "float32 factor of the sum"),
        Choice("a_scale", ("none", "token", "tensor", "block"), "dynamic scale of a, times the multiplier"),
        Choice("accumulate", ("fast", "promoted"), "whether sums leave the tensor core every BLOCK_K terms"),
        *EPILOGUE_CHOICES,
        Choice("out", ("bfloat16", "float16", "float32", "float8e4m3fn"), "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_batch_rule, _block_rule, epilogue_rule),
    least_arch=89,
)

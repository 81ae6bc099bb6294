"""Contract of ``decode_attention``: one query per sequence, keys and values in 8 or 4 bits.

out[b, h] = softmax_s(factor * q[b, h] . k[b, h // group, s]) . v[b, h // group, s] over s < lengths[b], where
``group`` = H / G query heads share a head of the cache (GQA; 1 for MHA). A sequence of length 0 gives zeros.

Caches, [B, G, S, D], keys and values in one format:

- int8: stored * scale;
- float8e4m3fn: stored * scale;
- uint4 (arguments k4, v4): (number - 8) * scale; byte j of D / 2 holds the number j in its low, D / 2 + j in its high
  bits (`qcompiler.kernels.decode_attention.reference.pack`).

Scales are float32: of the tensor [], of each channel [G, D], or of each token [B, G, S]; keys and values may differ.

The stored numbers are exact in float16, in which matrix units multiply: queries (times the keys' scales of channels)
and probabilities (times the values' scales of tokens) are rounded to float16. Exponents and sums are float32.

The grid depends on shapes only: lengths are read on the device, and cut into SPLIT equal parts of whole blocks. Parts
are stored and added by a second launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic
from qcompiler.kernels.operand import ITEMSIZE, Operand

LENGTHS = (64, 128, 256)
"""Lengths of a head that tiles are made for."""

ROWS = 16
"""Query heads of one program: the fewest rows of the matrix units."""

SCALES = ("tensor", "channel", "token")
BYTES = ("int8", "float8e4m3fn")


def scale_arguments(letter: str, what: str) -> tuple[Argument, ...]:
    """Return the arguments that hold the scales of keys (``k``) or values (``v``)."""
    option = f"{letter}_scale"
    return (
        Argument(f"{option}_one", ("float32",), (), when=(option, ("tensor",)), why=f"scale of all {what}"),
        Argument(
            f"{option}_channel", ("float32",), ("G", "D"), when=(option, ("channel",)), why=f"of {what}' channels"
        ),
        Argument(f"{option}_token", ("float32",), ("B", "G", "S"), when=(option, ("token",)), why=f"of {what}' tokens"),
    )


def softmax_factor(given: Mapping[str, Any], options: Options, length: int) -> float:
    """Return what scores are multiplied by."""
    return float(given["softmax_scale"]) if options["factor"] == "given" else float(length) ** -0.5


def _macs(dims: Dims, options: Options) -> int:
    return 2 * dims["B"] * dims["H"] * dims["S"] * dims["D"]


def head_tiles(dims: Dims) -> int:
    """Return how many programs share a head of the cache: one for up to 16 query heads."""
    return -(-(dims["H"] // dims["G"]) // ROWS)


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    """Count a call whose sequences all have the greatest length S."""
    batch, heads, cached, steps, length = (dims[d] for d in "BHGSD")
    tiles, split = head_tiles(dims), config["SPLIT"]
    blocks = -(-steps // config["BLOCK_S"])
    busy = -(-blocks // -(-blocks // split))  # parts that have blocks
    programs = batch * cached * tiles
    read = 4 * programs * split + ITEMSIZE[operands["q"].dtype] * batch * heads * length * busy
    for letter in "kv":
        read += operands[letter if letter in operands else letter + "4"].nbytes * tiles
        one, channel, token = 4 * programs * busy, 4 * programs * length * busy, 4 * programs * steps
        read += {"tensor": one, "channel": channel, "token": token}[options[f"{letter}_scale"]]
    partial = 4 * batch * heads * (length * busy + 2 * split)
    read += partial
    written = batch * heads * length * ITEMSIZE[options["out"]]
    return Traffic(read, written + partial, programs * blocks * 2 * ROWS * config["BLOCK_S"] * length)


def _length_rule(dims: Dims, options: Options) -> str | None:
    if dims["D"] not in LENGTHS:
        return f"heads must have length {', '.join(map(str, LENGTHS))}; found {dims['D']}"
    return None


def _heads_rule(dims: Dims, options: Options) -> str | None:
    if dims["H"] % dims["G"]:
        return f"query heads must be a multiple of the cache's {dims['G']}; found {dims['H']}"
    return None


def _scratch(dims: Dims, options: Options, config: Config) -> dict[str, Operand]:
    parts = (config["SPLIT"], dims["B"], dims["H"])
    return {"partial": Operand("float32", (*parts, dims["D"])), "statistics": Operand("float32", (*parts, 2))}


CONTRACT = Contract(
    name="decode_attention",
    purpose="attention of one query per sequence to a quantized cache",
    arguments=(
        Argument("q", ("float16", "bfloat16", "float32"), ("B", "H", "D"), why="queries"),
        Argument("k", BYTES, ("B", "G", "S", "D"), when=("cache", BYTES), dtype_of="cache", why="keys"),
        Argument("v", BYTES, ("B", "G", "S", "D"), when=("cache", BYTES), dtype_of="cache", why="values"),
        Argument("k4", ("uint8",), ("B", "G", "S", "D/2"), when=("cache", ("uint4",)), why="packed keys"),
        Argument("v4", ("uint8",), ("B", "G", "S", "D/2"), when=("cache", ("uint4",)), why="packed values"),
        *scale_arguments("k", "keys"),
        *scale_arguments("v", "values"),
        Argument("lengths", ("int32",), ("B",), why="tokens of each sequence, at most S"),
        Argument("softmax_scale", ("float32",), role="scalar", when=("factor", ("given",)), why="factor of the scores"),
        Argument("out", (), ("B", "H", "D"), role="output", dtype_of="out", why="result"),
        Argument("partial", ("float32",), ("P", "B", "H", "D"), role="scratch", why="sums of the parts"),
        Argument("statistics", ("float32",), ("P", "B", "H", "2"), role="scratch", why="their maxima and sums"),
    ),
    choices=(
        Choice("cache", ("int8", "float8e4m3fn", "uint4"), "format of keys and values"),
        Choice("k_scale", SCALES, "what has a scale of its own among the keys"),
        Choice("v_scale", SCALES, "the same among the values"),
        Choice("factor", ("root", "given"), "what scores are multiplied by: 1 / sqrt(D), or a number"),
        Choice("out", ("float16", "bfloat16", "float32"), "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_length_rule, _heads_rule),
    scratch_rule=_scratch,
)

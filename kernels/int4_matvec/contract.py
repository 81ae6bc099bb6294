"""Contract of ``int4_matvec``: the product of ``int4_matmul`` for up to 64 rows, K split over programs.

Arguments, options and storage are those of `qcompiler.kernels.int4_matmul.contract`. A row alone (BLOCK_M 1) is
multiplied in float32 without matrix units: weights are not rounded, a block's sum of (number - zero) * a is taken
before its scale. Parts of K are stored to ``partial`` and added by a second launch in their order, so that two runs
give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Contract, Dims, Options, Traffic
from qcompiler.kernels.int4_matmul.contract import (
    CHUNK,
    WEIGHT_ARGUMENTS,
    WEIGHT_CHOICES,
    codebook_rule,
    epilogue_requests,
    product_macs,
    product_requests,
    weight_name,
)
from qcompiler.kernels.operand import ITEMSIZE, Operand

MOST_ROWS = 64
"""Rows up to which this kernel is meant; more are right, too, but `int4_matmul` is faster there."""


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    one = config["BLOCK_M"] == 1
    product = (
        _row_requests(dims, operands, options, config) if one else product_requests(dims, operands, options, config)
    )
    partial = 4 * dims["M"] * dims["N"] * config["SPLIT"] if config["SPLIT"] > 1 else 0
    tiles_m = -(-dims["M"] // config["BLOCK_M"])
    if partial:
        tiles_m = dims["M"]
    ending = epilogue_requests(dims, operands, options, tiles_m)
    return Traffic(product.read + partial + ending.read, partial + ending.written, product.macs)


def _row_requests(dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config) -> Traffic:
    rows, columns, depth = (dims[d] for d in "MNK")
    packed = options["bits"] != "8"
    numbers = 2 * CHUNK if packed else CHUNK
    tiles_n, chunks = -(-columns // config["BLOCK_N"]), -(-depth // numbers)
    read = ITEMSIZE[operands["a"].dtype] * depth * tiles_n + operands[weight_name(options)].nbytes
    each = ITEMSIZE[operands["scales"].dtype] + (options["zeros"] == "block")
    loads = -(-depth // CHUNK) if packed and int(options["block"]) == CHUNK else chunks
    read += each * loads * columns
    if options["bits"] == "nf4":
        read += 4 * tiles_n * config["BLOCK_N"] * -(-depth // config["BLOCK_K"]) * config["BLOCK_K"]
    return Traffic(rows * read, 0, 0)


def _scratch(dims: Dims, options: Options, config: Config) -> dict[str, Operand]:
    if config["SPLIT"] == 1:
        return {}
    return {"partial": Operand("float32", (config["SPLIT"], dims["M"], dims["N"]))}


CONTRACT = Contract(
    name="int4_matvec",
    purpose="16-bit activations by weights of 4 or 8 bits in blocks, up to 64 rows",
    arguments=(
        *WEIGHT_ARGUMENTS,
        Argument("partial", ("float32",), ("S", "M", "N"), role="scratch", why="sums of the parts of K"),
    ),
    choices=WEIGHT_CHOICES,
    macs_rule=product_macs,
    requests_rule=_requests,
    rules=(codebook_rule,),
    scratch_rule=_scratch,
)

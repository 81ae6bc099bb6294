"""Contract of ``int4_matmul``: out[m, n] = epilogue(sum_k a[m, k] * (w[n, k] - zero) * scale), blocks along k.

Weights are unsigned numbers of 4 or 8 bits (what a model stores signed is kept with 8 or 128 added), or indices into a
codebook of 16 numbers (nf4). ``block`` numbers along K share a scale and a zero point; without zero points the latter
is the middle, 8 or 128, as in MatMulNBits and for signed formats.

Storage, of both kernels with these weights (`qcompiler.kernels.int4_matmul.reference.pack`):

- ``w`` uint8 [N, K/32, 16]: byte j of a chunk of 32 numbers holds number j in its low, number 16 + j in its high bits;
- ``w8`` uint8 [N, K/16, 16]: the numbers in order;
- ``scales`` and ``zeros`` [K/block, N]: neighbouring columns lie side by side, zero points one per byte.

A weight is (number - zero) * scale in float32, rounded once to the dtype of ``a``; products are summed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic
from qcompiler.kernels.epilogue.contract import EPILOGUE_CHOICES, EPILOGUE_SCALARS, RESIDUAL_DTYPES
from qcompiler.kernels.operand import ITEMSIZE, Operand

BLOCKS = ("32", "16", "64", "128", "256")
HALVES = ("float16", "bfloat16")
CHUNK = 16
"""Bytes that are packed and loaded together."""

WEIGHT_ARGUMENTS = (
    Argument("a", HALVES, ("M", "K"), why="activations"),
    Argument("w", ("uint8",), ("N", "K/32", "16"), when=("bits", ("4", "nf4")), why="packed weights of 4 bits"),
    Argument("w8", ("uint8",), ("N", "K/16", "16"), when=("bits", ("8",)), why="weights of 8 bits"),
    Argument("scales", (*HALVES, "float32"), ("K/block", "N"), why="scale of each block"),
    Argument("zeros", ("uint8",), ("K/block", "N"), when=("zeros", ("block",)), why="zero point of each block"),
    Argument("codebook", ("float32",), ("16",), when=("bits", ("nf4",)), why="numbers that the indices stand for"),
    Argument("bias", ("float32", *HALVES), ("N",), when=("bias", ("channel",)), why="float bias"),
    Argument("residual", RESIDUAL_DTYPES, ("M", "N"), when=("residual", ("before", "after")), why="to add"),
    *EPILOGUE_SCALARS,
    Argument("out", (), ("M", "N"), role="output", dtype_of="out", why="result"),
)

WEIGHT_CHOICES = (
    Choice("bits", ("4", "8", "nf4"), "of the weights; nf4 are indices of 4 bits into a codebook"),
    Choice("block", BLOCKS, "numbers along K that share a scale"),
    Choice("zeros", ("none", "block"), "zero points; none is the middle of the range, 8 or 128"),
    *EPILOGUE_CHOICES,
    Choice("out", ("float16", "bfloat16", "float32", "int8", "uint8", "float8e4m3fn"), "dtype of out"),
)


def weight_name(options: Options) -> str:
    """Return the name of the argument that holds the weights."""
    return "w8" if options["bits"] == "8" else "w"


def codebook_rule(dims: Dims, options: Options) -> str | None:
    """Return what is wrong with zero points, None if nothing."""
    if options["bits"] == "nf4" and options["zeros"] != "none":
        return f"a codebook has no zero points; expected zeros none, found {options['zeros']}"
    return None


def product_macs(dims: Dims, options: Options) -> int:
    """Return the multiply-adds of the product."""
    return dims["M"] * dims["N"] * dims["K"]


def product_requests(dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config) -> Traffic:
    """Return bytes and multiply-adds of the product on matrix units, without its epilogue."""
    rows, columns, depth = (dims[d] for d in "MNK")
    packed = options["bits"] != "8"
    tiles_m, tiles_n = -(-rows // config["BLOCK_M"]), -(-columns // config["BLOCK_N"])
    steps = -(-depth // config["BLOCK_K"])
    block = int(options["block"])
    read = ITEMSIZE[operands["a"].dtype] * rows * depth * tiles_n
    read += operands[weight_name(options)].nbytes * tiles_m
    # A scale is loaded once per tile of K that it reaches into, and for both halves of a chunk.
    turns = 2 if packed and block == CHUNK else 1
    loads = sum(
        -(-min(config["BLOCK_K"], depth - k) // block) if turns == 2 or block < config["BLOCK_K"] else 1
        for k in range(0, depth, config["BLOCK_K"])
    )
    loads *= 2 if packed and turns == 1 else 1
    each = ITEMSIZE[operands["scales"].dtype] + (options["zeros"] == "block")
    read += each * loads * columns * tiles_m
    padded_m, padded_n = tiles_m * config["BLOCK_M"], tiles_n * config["BLOCK_N"]
    if options["bits"] == "nf4":
        read += 4 * padded_n * steps * config["BLOCK_K"] * tiles_m
    return Traffic(read, 0, padded_m * padded_n * steps * config["BLOCK_K"])


def epilogue_requests(dims: Dims, operands: Mapping[str, Operand], options: Options, tiles_m: int) -> Traffic:
    """Return the bytes of bias, residual and output; ``tiles_m`` programs load the bias of a column."""
    elements = dims["M"] * dims["N"]
    read = 0
    if options["bias"] == "channel":
        read += operands["bias"].nbytes * tiles_m
    if options["residual"] != "none":
        read += elements * ITEMSIZE[operands["residual"].dtype]
    return Traffic(read, elements * ITEMSIZE[options["out"]])


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    product = product_requests(dims, operands, options, config)
    ending = epilogue_requests(dims, operands, options, -(-dims["M"] // config["BLOCK_M"]))
    return Traffic(product.read + ending.read, ending.written, product.macs)


CONTRACT = Contract(
    name="int4_matmul",
    purpose="16-bit activations by weights of 4 or 8 bits in blocks, more than 64 rows",
    arguments=WEIGHT_ARGUMENTS,
    choices=WEIGHT_CHOICES,
    macs_rule=product_macs,
    requests_rule=_requests,
    rules=(codebook_rule,),
)

"""Contract of ``int8_matmul``: out[b, m, n] = epilogue(sum_k (a[b, m, k] - az) * (w[b, n, k] - wz)).

Both operands are s8. A tensor that a model stores as u8 is kept as s8 with its zero point less 128 (XOR 0x80), the same
real numbers; the matrix units have no mixed product in Triton.

The sum is exact in int32: with a zero point in [-128, 127] and weights without one, each term is at most 255 * 128, so
K may be 65793; with zero points on both sides, 255 * 255, so K may be 33025. Partial sums may wrap, the total does not,
unless an int32 bias in ``offset`` brings it beyond the range, as in ONNX.

How the zero point of ``a`` reaches the sum, sum_k a * w - az * sum_k w - wz * sum_k a + K * az * wz:

- static: ``offset[n] = -az * column_sum[n]`` and an int32 bias, found when weights are packed (zeros none, offset
  channel);
- dynamic, per token or for the tensor: ``a_zero`` is read from memory, and ``column_sum`` (zeros token, tensor);
- of two activations, with ``az`` and ``wz`` numbers: sums of rows and columns are taken inside (zeros kernel).

Heads of an attention lie side by side in the row of a token. With ``batch`` two the batch has two axes [G, H] whose
strides are free, and zero where the second operand is the same for all: a head is read where it lies, and the result
is written where the next product reads it.
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

MOST_TERMS = {"none": 65793, "token": 65793, "tensor": 65793, "kernel": 33025}
"""Greatest K for which the sum fits int32, by the option ``zeros``."""


def _macs(dims: Dims, options: Options) -> int:
    return matrices(dims, options) * dims["M"] * dims["N"] * dims["K"]


def matrices(dims: Dims, options: Options) -> int:
    """Return how many products a call computes."""
    return dims["G"] * dims["H"] if options["batch"] == "two" else dims["B"]


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    batch, rows, columns, depth = (matrices(dims, options), *(dims[d] for d in "MNK"))
    tiles_m, tiles_n = -(-rows // config["BLOCK_M"]), -(-columns // config["BLOCK_N"])
    read = rows * depth * tiles_n + columns * depth * tiles_m
    read += 4 * columns * tiles_m * sum(options[o] == "channel" for o in ("multiplier", "offset"))
    if options["bias"] == "channel":
        read += ITEMSIZE[operands["bias"].dtype] * columns * tiles_m
    if options["zeros"] in ("token", "tensor"):
        read += 4 * columns * tiles_m  # column_sum
    for option in ("a_scale", "zeros"):
        read += {"token": 4 * rows * tiles_n, "tensor": 4 * tiles_m * tiles_n}.get(options[option], 0)
    if options["residual"] != "none":
        read += rows * columns * ITEMSIZE[operands["residual"].dtype]
    steps = -(-depth // config["BLOCK_K"])
    macs = tiles_m * config["BLOCK_M"] * tiles_n * config["BLOCK_N"] * steps * config["BLOCK_K"]
    return Traffic(batch * read, batch * rows * columns * ITEMSIZE[options["out"]], batch * macs)


def _depth_rule(dims: Dims, options: Options) -> str | None:
    most = MOST_TERMS[options["zeros"]]
    return f"the sum fits int32 up to K = {most}; found K = {dims['K']}" if dims["K"] > most else None


def _batch_rule(dims: Dims, options: Options) -> str | None:
    batch = matrices(dims, options)
    if batch > MOST_MATRICES:
        return f"a batch may have {MOST_MATRICES} matrices; found {batch}"
    if options["batch"] == "two":
        if dims["WG"] not in (1, dims["G"]) or dims["WH"] not in (1, dims["H"]):
            return f"w must have 1 or {dims['G']} by 1 or {dims['H']} matrices; found {dims['WG']} by {dims['WH']}"
        if options["zeros"] not in ("none", "kernel") or options["a_scale"] != "none":
            return "scales and zero points of a that are read have one axis for the batch; expected batch one"
    elif dims["W"] not in (1, batch):
        return f"w must have one matrix, or one for each of the {batch} of a; found {dims['W']}"
    return None


def _plain_rule(dims: Dims, options: Options) -> str | None:
    scaled = options["multiplier"] != "none" or options["a_scale"] != "none"
    if options["out"] == "int32" and scaled:
        return "out int32 is the plain sum; expected multiplier none and a_scale none"
    if options["out"] != "int32" and options["multiplier"] == "none":
        return f"out {options['out']} needs a multiplier; found none"
    return None


def _two(*axes: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the axes that an argument has where the batch has two."""
    return "batch", "two", axes


CONTRACT = Contract(
    name="int8_matmul",
    purpose="s8 x s8 matrix product with zero points, scales and a fused epilogue",
    arguments=(
        Argument("a", ("int8",), ("B", "M", "K"), why="activations", dims_when=_two("G", "H", "M", "K")),
        Argument(
            "w", ("int8",), ("W", "N", "K"), when=("w_layout", ("nk",)), why="weights, packed to (N, K)",
            dims_when=_two("WG", "WH", "N", "K"),
        ),
        Argument(
            "w_kn", ("int8",), ("W", "K", "N"), when=("w_layout", ("kn",)), why="second operand as (K, N)",
            dims_when=_two("WG", "WH", "K", "N"),
        ),
        Argument(
            "multiplier", ("float32",), ("N",), when=("multiplier", ("channel",)), why="scale per step of the sum"
        ),
        Argument("scale", ("float32",), role="scalar", when=("multiplier", ("scalar",)), why="the same for all"),
        Argument("offset", ("int32",), ("N",), when=("offset", ("channel",)), why="zero-point term and int32 bias"),
        Argument("a_scale", ("float32",), ("B", "M"), when=("a_scale", ("token",)), packed=True, why="dynamic scales"),
        Argument("a_scale_one", ("float32",), (), when=("a_scale", ("tensor",)), why="the dynamic scale"),
        Argument("a_zero", ("int32",), ("B", "M"), when=("zeros", ("token",)), packed=True, why="dynamic zero points"),
        Argument("a_zero_one", ("int32",), (), when=("zeros", ("tensor",)), why="the dynamic zero point"),
        Argument("column_sum", ("int32",), ("N",), when=("zeros", ("token", "tensor")), why="sum of w over K"),
        Argument("a_point", ("int32",), role="scalar", when=("zeros", ("kernel",)), why="zero point of a"),
        Argument("w_point", ("int32",), role="scalar", when=("zeros", ("kernel",)), why="zero point of w"),
        Argument("bias", ("float32", "float16"), ("N",), when=("bias", ("channel",)), why="float bias"),
        Argument(
            "residual", RESIDUAL_DTYPES, ("B", "M", "N"), when=("residual", ("before", "after")), why="to add",
            dims_when=_two("G", "H", "M", "N"),
        ),
        *EPILOGUE_SCALARS,
        Argument(
            "out", (), ("B", "M", "N"), role="output", dtype_of="out", why="result", dims_when=_two("G", "H", "M", "N")
        ),
    ),
    choices=(
        Choice("batch", ("one", "two"), "axes of the batch; two have strides of their own, as heads of an attention"),
        Choice("w_layout", ("nk", "kn"), "order of the second operand; kn is transposed on the way, slower"),
        Choice("multiplier", ("channel", "scalar", "none"), "float32 factor of the sum; none for out int32 only"),
        Choice("offset", ("none", "channel"), "int32 added to the sum"),
        Choice("a_scale", ("none", "token", "tensor"), "dynamic scale of a, times the multiplier"),
        Choice("zeros", ("none", "token", "tensor", "kernel"), "zero points that offset does not hold"),
        *EPILOGUE_CHOICES,
        Choice("out", ("float16", "bfloat16", "float32", "int8", "uint8", "float8e4m3fn", "int32"), "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_depth_rule, _batch_rule, _plain_rule, epilogue_rule),
)  # fmt: skip

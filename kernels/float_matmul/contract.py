"""Contract of ``float_matmul``: out[b, m, n] = epilogue(scale * sum_k a[b, m, k] * w[b, k, n]), of floats.

For products that a plan leaves in float inside a quantized model: sums too short for 8 bits (heads of an attention with
few channels), and those whose rounding a bound on accuracy bars. They keep what makes integer products fast: heads are
read where they lie, by strides, and what stands behind is done before the result leaves the chip.

Operands of float32 are multiplied in TF32, with 10 bits behind the leading one, as the tensor cores take them; those of
16 bits as they are. Sums are float32.
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

FLOATS = ("float32", "float16", "bfloat16")


def _macs(dims: Dims, options: Options) -> int:
    return _matrices(dims, options) * dims["M"] * dims["N"] * dims["K"]


def _matrices(dims: Dims, options: Options) -> int:
    return dims["G"] * dims["H"] if options["batch"] == "two" else dims["B"]


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    batch, rows, columns, depth = (_matrices(dims, options), *(dims[d] for d in "MNK"))
    tiles_m, tiles_n = -(-rows // config["BLOCK_M"]), -(-columns // config["BLOCK_N"])
    read = ITEMSIZE[operands["a"].dtype] * (rows * depth * tiles_n + columns * depth * tiles_m)
    if options["bias"] == "channel":
        read += ITEMSIZE[operands["bias"].dtype] * columns * tiles_m
    if options["residual"] != "none":
        read += rows * columns * ITEMSIZE[operands["residual"].dtype]
    steps = -(-depth // config["BLOCK_K"])
    macs = tiles_m * config["BLOCK_M"] * tiles_n * config["BLOCK_N"] * steps * config["BLOCK_K"]
    return Traffic(batch * read, batch * rows * columns * ITEMSIZE[options["out"]], batch * macs)


def _batch_rule(dims: Dims, options: Options) -> str | None:
    batch = _matrices(dims, options)
    if batch > MOST_MATRICES:
        return f"a batch may have {MOST_MATRICES} matrices; found {batch}"
    if options["batch"] == "two":
        if dims["WG"] not in (1, dims["G"]) or dims["WH"] not in (1, dims["H"]):
            return f"w must have 1 or {dims['G']} by 1 or {dims['H']} matrices; found {dims['WG']} by {dims['WH']}"
    elif dims["W"] not in (1, batch):
        return f"w must have one matrix, or one for each of the {batch} of a; found {dims['W']}"
    return None


def _two(*axes: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the axes that an argument has where the batch has two."""
    return "batch", "two", axes


CONTRACT = Contract(
    name="float_matmul",
    purpose="product of floats, read by strides, with a fused epilogue",
    arguments=(
        Argument("a", FLOATS, ("B", "M", "K"), why="activations", dims_when=_two("G", "H", "M", "K")),
        Argument(
            "w", FLOATS, ("W", "N", "K"), when=("w_layout", ("nk",)), dtype_like="a", why="weights, packed to (N, K)",
            dims_when=_two("WG", "WH", "N", "K"),
        ),
        Argument(
            "w_kn", FLOATS, ("W", "K", "N"), when=("w_layout", ("kn",)), dtype_like="a",
            why="second operand as (K, N)", dims_when=_two("WG", "WH", "K", "N"),
        ),
        Argument("scale", ("float32",), role="scalar", when=("factor", ("scalar",)), why="factor of the sum"),
        Argument("bias", FLOATS, ("N",), when=("bias", ("channel",)), why="float bias"),
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
        Choice("w_layout", ("nk", "kn"), "order of the second operand"),
        Choice("factor", ("none", "scalar"), "whether a number multiplies the sum, as that of an attention's scores"),
        *EPILOGUE_CHOICES,
        Choice("out", ("float32", "float16", "bfloat16", "int8", "uint8", "float8e4m3fn"), "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_batch_rule, epilogue_rule),
)  # fmt: skip

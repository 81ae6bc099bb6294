"""Contract of ``norm_quantize``: h = x (+ residual), y = norm(h) * gamma (+ beta), q = quantize(y), row by row.

A row is held in registers, read once and written once. Everything is computed in float32; a sum x + residual that is
kept is rounded to x's dtype first, as the separate Add would do. Norms are those of ONNX: LayerNormalization over the
last axis (biased variance), and root mean square without a mean.

Scales: ``static`` is a number; ``token`` is found per row, the ONNX rule (largest magnitude over 127, or 448 for
float8e4m3fn; with ``zeros token`` (greatest - least) / 255 over a range that holds 0, as DynamicQuantizeLinear, the
zero point less 128); ``group`` is per row and ``group`` columns, symmetric. Quotients are IEEE divisions, so that
``norm none`` equals QuantizeLinear bit for bit. A row of zeros has scale 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompiler.kernels.config import Config
from qcompiler.kernels.contract import Argument, Choice, Contract, Dims, Options, Traffic
from qcompiler.kernels.operand import Operand

MOST_COLUMNS = 32768
"""Longest row that the registers of one program hold."""

FLOATS = ("float16", "bfloat16", "float32")
QUANTIZED = ("int8", "float8e4m3fn")


def _macs(dims: Dims, options: Options) -> int:
    return 0


def _requests(
    contract: Contract, dims: Dims, operands: Mapping[str, Operand], options: Options, config: Config
) -> Traffic:
    programs = -(-dims["M"] // config["ROWS"])
    read = sum(operands[n].nbytes for n in ("x", "residual") if n in operands)
    read += sum(operands[n].nbytes * programs for n in ("gamma", "beta") if n in operands)
    written = sum(operands[a.name].nbytes for a in contract.tensors(options) if a.role == "output")
    return Traffic(read, written, 0)


def _length_rule(dims: Dims, options: Options) -> str | None:
    if dims["N"] > MOST_COLUMNS:
        return f"a row may have {MOST_COLUMNS} columns; found {dims['N']}"
    if options["scale"] == "group" and dims["N"] % int(options["group"]):
        return f"groups of {options['group']} must divide a row; found {dims['N']} columns"
    return None


def _scale_rule(dims: Dims, options: Options) -> str | None:
    quantized = options["out"] in QUANTIZED
    if quantized != (options["scale"] != "none"):
        return f"out {options['out']} and scale {options['scale']} do not fit: 8-bit outputs have scales, others none"
    if options["zeros"] == "token" and (options["out"] != "int8" or options["scale"] != "token"):
        return f"zeros token needs out int8 and scale token; found out {options['out']} and scale {options['scale']}"
    return None


CONTRACT = Contract(
    name="norm_quantize",
    purpose="residual add, layer or root-mean-square norm, and quantization of rows in one pass",
    arguments=(
        Argument("x", FLOATS, ("M", "N"), why="rows"),
        Argument("residual", FLOATS, ("M", "N"), when=("residual", ("add", "keep")), why="added to x"),
        Argument("gamma", FLOATS, ("N",), when=("norm", ("rms", "layer")), why="scale of the norm"),
        Argument("beta", FLOATS, ("N",), when=("beta", ("channel",)), why="shift of the norm"),
        Argument("eps", ("float32",), role="scalar", when=("norm", ("rms", "layer")), why="added to the variance"),
        Argument("scale", ("float32",), role="scalar", when=("scale", ("static",)), why="the static scale"),
        Argument("zero", ("int32",), role="scalar", when=("scale", ("static",)), why="its zero point, 0 for e4m3"),
        Argument("out", (), ("M", "N"), role="output", dtype_of="out", why="quantized rows"),
        Argument("scales", ("float32",), ("M",), role="output", when=("scale", ("token",)), why="scale of each row"),
        Argument(
            "group_scales",
            ("float32",),
            ("M", "N/group"),
            role="output",
            when=("scale", ("group",)),
            packed=True,
            why="of groups",
        ),
        Argument("zeros", ("int32",), ("M",), role="output", when=("zeros", ("token",)), why="zero point of each row"),
        Argument("kept", FLOATS, ("M", "N"), role="output", when=("residual", ("keep",)), dtype_like="x", why="sum"),
        Argument("normed", FLOATS, ("M", "N"), role="output", when=("also", ("normed",)), dtype_like="x", why="y"),
    ),
    choices=(
        Choice("norm", ("none", "rms", "layer"), "normalization of each row"),
        Choice("beta", ("none", "channel"), "shift after the norm"),
        Choice("residual", ("none", "add", "keep"), "add a tensor first; keep also stores the sum, in x's dtype"),
        Choice("also", ("none", "normed"), "store the float rows as well"),
        Choice("scale", ("token", "static", "group", "none"), "how scales are found"),
        Choice("group", ("128", "64", "32"), "columns that share a scale"),
        Choice("zeros", ("none", "token"), "dynamic zero points"),
        Choice("out", ("int8", "float8e4m3fn", *FLOATS), "dtype of out"),
    ),
    macs_rule=_macs,
    requests_rule=_requests,
    rules=(_length_rule, _scale_rule),
)

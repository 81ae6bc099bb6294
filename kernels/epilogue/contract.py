"""The options and arguments that every kernel with an epilogue shares."""

from __future__ import annotations

from qcompiler.kernels.contract import Argument, Choice, Dims, Options

ACTIVATIONS = (
    "none",
    "relu",
    "clip",
    "leaky_relu",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "hard_swish",
)
"""``clip`` is to [low, high]; ``leaky_relu`` multiplies negative numbers by low; ``gelu`` is the exact one, by erf."""

PIECEWISE = ("none", "relu", "clip", "leaky_relu")
"""Activations without a transcendental function: results equal the reference bit for bit."""

MOST_MATRICES = 65535
"""Greatest length of a batch: it is the second axis of the grid."""

RESIDUAL_DTYPES = ("float16", "bfloat16", "float32", "int8")

QUANTIZED = ("int8", "uint8", "float8e4m3fn")
"""Output dtypes that are scaled."""

EPILOGUE_CHOICES = (
    Choice("bias", ("none", "channel"), "float bias, added after the multiplication and before all else"),
    Choice("residual", ("none", "before", "after"), "tensor to add before or after the activation"),
    Choice("activation", ACTIVATIONS, "element-wise function"),
    Choice("out_scale", ("folded", "scalar"), "where 1/scale of the output is: in the multiplier, or a number"),
)

EPILOGUE_SCALARS = (
    Argument("low", ("float32",), role="scalar", when=("activation", ("clip", "leaky_relu")), why="bound, or slope"),
    Argument("high", ("float32",), role="scalar", when=("activation", ("clip",)), why="upper bound of clip"),
    Argument("residual_scale", ("float32",), role="scalar", when=("residual", ("before", "after")), why="of residual"),
    Argument("residual_zero", ("int32",), role="scalar", when=("residual", ("before", "after")), why="of residual"),
    Argument("out_inverse", ("float32",), role="scalar", when=("out_scale", ("scalar",)), why="1 / output scale"),
    Argument("out_zero", ("int32",), role="scalar", when=("out", ("int8", "uint8")), why="output zero point"),
)
"""A residual is (stored - residual_zero) * residual_scale in the unit of the sum; 0 and 1 for float residuals."""


def epilogue_rule(dims: Dims, options: Options) -> str | None:
    """Return what is wrong with the combination of options of an epilogue, None if nothing."""
    if options["out"] == "int32":
        for name, default in (("bias", "none"), ("residual", "none"), ("activation", "none"), ("out_scale", "folded")):
            if options[name] != default:
                return f"out int32 is the plain sum; expected {name} {default}, found {options[name]}"
    return None

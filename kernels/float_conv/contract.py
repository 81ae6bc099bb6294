"""Contract of ``float_conv``: out[n, p, q, o] = epilogue(sum_rsc x[n, h, w, c] * w[o, r, s, c]), of floats.

For convolutions that a plan leaves in float between quantized ones: they read and write channels last as their
neighbours do, and store what those read. Layouts, geometry and groups are those of `qcompiler.kernels.int8_conv`, with
0 outside the picture; operands of float32 are multiplied in TF32, as in ``float_matmul``, except for depthwise ones,
which use no matrix units. Sums are float32.
"""

from __future__ import annotations

from qcompiler.kernels.contract import Argument, Choice
from qcompiler.kernels.epilogue.contract import EPILOGUE_CHOICES, EPILOGUE_SCALARS, RESIDUAL_DTYPES, epilogue_rule
from qcompiler.kernels.float_matmul.contract import FLOATS
from qcompiler.kernels.int8_conv.contract import GEOMETRY, ConvContract, conv_macs, refuse_requests

CONTRACT = ConvContract(
    name="float_conv",
    purpose="convolution of floats in NHWC with groups and a fused epilogue",
    arguments=(
        Argument("x", FLOATS, ("N", "H", "W", "C"), why="activations"),
        Argument("w", FLOATS, ("O", "R", "S", "D"), when=("kind", ("dense",)), dtype_like="x", why="weights"),
        Argument(
            "w_rso", FLOATS, ("R", "S", "O"), when=("kind", ("depthwise",)), dtype_like="x",
            why="weights of one channel each",
        ),
        Argument("bias", FLOATS, ("O",), when=("bias", ("channel",)), why="float bias"),
        Argument(
            "residual", RESIDUAL_DTYPES, ("N", "P", "Q", "O"), when=("residual", ("before", "after")), why="to add"
        ),
        Argument("group", ("int32",), role="scalar", when=("kind", ("dense",)), why="groups of channels"),
        *(Argument(name, ("int32",), role="scalar", why=f"geometry, at least {n}") for name, n in GEOMETRY.items()),
        *EPILOGUE_SCALARS,
        Argument("out", (), ("N", "P", "Q", "O"), role="output", dtype_of="out", why="result"),
    ),
    choices=(
        Choice("kind", ("dense", "depthwise"), "dense, also in groups, or one channel for each output"),
        Choice("pad", ("zero", "none"), "what lies outside the picture: 0, or nothing does"),
        *EPILOGUE_CHOICES,
        Choice("out", ("float32", "float16", "bfloat16", "int8", "uint8", "float8e4m3fn"), "dtype of out"),
    ),
    macs_rule=conv_macs,
    requests_rule=refuse_requests,
    rules=(epilogue_rule,),
)  # fmt: skip

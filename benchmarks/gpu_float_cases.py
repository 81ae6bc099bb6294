"""Cases of the kernels of floats: scores of short heads, products by weights, convolutions."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from gpu_cases import Compiler, Given, GpuCase, Launch, wide
from torch import Tensor

TOLERANCE = 2e-3
"""Twice what TF32 cuts off of an operand."""


def heads_product(given: Given) -> dict[str, Tensor]:
    """Return the scores of all heads, times their factor."""
    return {"out": wide(given["a"]) @ wide(given["w"]).transpose(-1, -2) * given.get("scale", 1.0)}


def float_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuBLAS in float32 as torch has it by default, without TF32."""
    a, w = given["a"], given["w"].transpose(-1, -2)
    return {"fp32 cuBLAS": lambda: a @ w}


def silu_convolution(given: Given) -> dict[str, Tensor]:
    """Return silu(conv + bias)."""
    x, w = wide(given["x"]).permute(0, 3, 1, 2), wide(given["w"]).permute(0, 3, 1, 2)
    return {"out": F.silu(F.conv2d(x, w, wide(given["bias"]), padding=1)).permute(0, 2, 3, 1)}


def float_convolution_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuDNN, channels last, and the activation behind it."""
    x, w, bias = given["x"].permute(0, 3, 1, 2), given["w"].permute(0, 3, 1, 2), given["bias"]
    return {"cuDNN channels-last, silu": lambda: F.silu(F.conv2d(x, w, bias, padding=1))}


def same_window(given: Given) -> None:
    """Set a stride of 1 and padding that keeps 3 x 3 the same size."""
    given |= dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w", "group"), 1)
    given |= {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}


def float_cases() -> list[GpuCase]:
    """Return products and convolutions that stay in float."""
    heads = {"G": 8, "H": 12, "WG": 8, "WH": 12, "M": 512, "N": 512, "K": 8}
    few = heads | {"G": 1, "H": 2, "WG": 1, "WH": 2, "M": 40, "N": 40}
    rows = {"B": 1, "M": 4096, "N": 4096, "K": 4096, "W": 1}
    scores = {"batch": "two", "factor": "scalar"}
    image = {"N": 16, "H": 80, "W": 80, "P": 80, "Q": 80, "C": 64, "D": 64, "O": 64, "R": 3, "S": 3}
    small = image | {"N": 1, "H": 9, "W": 9, "P": 9, "Q": 9, "C": 16, "D": 16, "O": 16}
    silu = {"bias": "channel", "activation": "silu", "pad": "zero"}
    return [
        GpuCase("K12", "float_matmul", "scores of 96 heads of 8, 512 tokens", heads, few, heads_product, float_rivals,
                TOLERANCE, scores, target="1.0x"),
        GpuCase("K12", "float_matmul", "4096x4096x4096", rows, rows | {"M": 64, "N": 64, "K": 96}, heads_product,
                float_rivals, TOLERANCE, target="1.0x"),
        GpuCase("K13", "float_conv", "3x3 64->64 at 80, batch 16, silu", image, small, silu_convolution,
                float_convolution_rivals, TOLERANCE, silu, adjust=same_window, target="1.0x"),
    ]  # fmt: skip

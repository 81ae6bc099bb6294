"""Cases of kernels with weights in 4 bits, of attention to a quantized cache, and of convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_cases import Compiler, Given, GpuCase, Launch, memory_cases, product_cases, rounded, wide
from gpu_float_cases import float_cases
from torch import Tensor

# ---- K4, K5: weights in 4 bits ------------------------------------------------------------------------------------


def unpacked(given: Given, block: int = 128) -> Tensor:
    """Return the weights [N, K] in float64: (number - 8) * scale."""
    packed = given["w"]
    numbers = torch.cat([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)[:, : given["a"].shape[1]]
    scale = wide(given["scales"]).t().repeat_interleave(block, 1)[:, : numbers.shape[1]]
    return (wide(numbers) - 8) * scale


def int4_product(given: Given) -> dict[str, Tensor]:
    """Return the product with dequantized weights."""
    return {"out": wide(given["a"]) @ unpacked(given).t()}


def int4_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuBLAS in float16."""
    a, w = given["a"], unpacked(given).to(given["a"].dtype).t()
    return {"fp16 cuBLAS": lambda: a @ w}


# ---- K6: decode attention -----------------------------------------------------------------------------------------


def cache_of(given: Given, letter: str) -> Tensor:
    """Return keys or values in float64 [B, G, S, D]."""
    if f"{letter}_scale_token" in given:
        return wide(given[letter]) * wide(given[f"{letter}_scale_token"])[..., None]
    return wide(given[letter]) * wide(given[f"{letter}_scale_one"])


def score_factor(given: Given) -> float:
    """Return what scores are multiplied by."""
    return float(given["q"].shape[-1] ** -0.5)


def attention(given: Given) -> dict[str, Tensor]:
    """Return softmax(q k^T) v, sequence by sequence."""
    q, scale = wide(given["q"]), score_factor(given)
    batch, heads, length = q.shape
    out = torch.empty_like(q)
    k, v = cache_of(given, "k"), cache_of(given, "v")
    for b in range(batch):
        grouped = q[b].reshape(k.shape[1], -1, length)
        p = torch.softmax(grouped @ k[b].transpose(-1, -2) * scale, -1)
        out[b] = (p @ v[b]).reshape(heads, length)
    return {"out": out}


def attention_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return SDPA on a bfloat16 cache, and on the quantized one, dequantized before."""
    q = given["q"].to(torch.bfloat16)[:, :, None, :]
    k, v = cache_of(given, "k").to(torch.bfloat16), cache_of(given, "v").to(torch.bfloat16)
    scale = score_factor(given)

    def attend(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    scales = [given.get(f"{n}_scale_token", given.get(f"{n}_scale_one")) for n in "kv"]
    scales = [s[..., None] if s.dim() else s for s in scales]

    def dequantize(k: Tensor, v: Tensor, ks: Tensor, vs: Tensor) -> tuple[Tensor, Tensor]:
        return (k.float() * ks).to(torch.bfloat16), (v.float() * vs).to(torch.bfloat16)

    widen = compiler(dequantize)
    return {
        "SDPA bf16": lambda: attend(k, v),
        "compiled dequantization + SDPA": lambda: attend(*widen(given["k"], given["v"], *scales)),
    }


def sensible_attention(given: Given) -> None:
    """Set scales so that scores have a spread of about one."""
    reach = 74.0 if given["k"].dtype == torch.int8 else 1.0
    for name, tensor in given.items():
        if "_scale_" in name and isinstance(tensor, Tensor):
            tensor.fill_(1.0 / reach) if not tensor.dim() else tensor.mul_(128.0 / reach)


# ---- K8: convolution ----------------------------------------------------------------------------------------------


def place(given: Given) -> dict[str, object]:
    """Return stride and padding as torch names them."""
    return {"stride": (given["stride_h"], given["stride_w"]), "padding": (given["pad_top"], given["pad_left"])}


def convolution(given: Given) -> dict[str, Tensor]:
    """Return relu((conv + offset) * multiplier), rounded."""
    x, w = wide(given["x"]).permute(0, 3, 1, 2), wide(given["w"]).permute(0, 3, 1, 2)
    total = F.conv2d(x, w, **place(given)).permute(0, 2, 3, 1) + given["offset"]  # type: ignore[arg-type]  # keywords
    return {"out": rounded(torch.relu(total * wide(given["multiplier"])), given["out_zero"])}


def convolution_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuDNN in float16, channels last, with a bias and without the activation."""
    x = given["x"].to(torch.float16).permute(0, 3, 1, 2)
    w = given["w"].to(torch.float16).permute(0, 3, 1, 2)
    bias, where = given["multiplier"].to(torch.float16), place(given)
    return {"cuDNN fp16 channels-last": lambda: F.conv2d(x, w, bias, **where)}  # type: ignore[arg-type]  # keywords


def adjust_convolution(stride: int, pad: int) -> object:
    """Return what sets the geometry, and a multiplier that spreads the outputs over the s8 range."""

    def adjust(given: Given) -> None:
        given |= {"stride_h": stride, "stride_w": stride, "dilation_h": 1, "dilation_w": 1, "group": 1}
        given |= {f"pad_{side}": pad for side in ("top", "left", "bottom", "right")}
        terms = given["w"][0].numel()
        given["multiplier"].fill_(40.0 / (74.0**2 * terms**0.5))

    return adjust


RESNET = (
    (56, 64, 64, 3, 1), (56, 64, 256, 1, 1), (56, 128, 128, 3, 2), (28, 128, 128, 3, 1), (14, 256, 256, 3, 1),
    (14, 1024, 256, 1, 1), (7, 512, 512, 3, 1), (7, 512, 2048, 1, 1), (224, 16, 64, 7, 2),
)  # fmt: skip
"""Layers of ResNet-50: side of the picture, channels in and out (the first layer's three padded), window, stride."""


def int4_cases() -> list[GpuCase]:
    """Return products with weights in 4 bits, blocks of 128."""
    found = []
    for n, k in ((28672, 8192), (8192, 8192)):
        for m in (1, 16, 4, 64, 1024, 256, 4096):
            if m > 64 and n > k:
                continue
            kernel, key = ("int4_matvec", "K4") if m <= 64 else ("int4_matmul", "K5")
            target = {1: "2.2x", 4: "", 16: "2.0x", 64: ""}.get(m, "0.70x")
            found.append(
                GpuCase(key, kernel, f"M={m} N={n} K={k}", {"M": m, "N": n, "K": k},
                        {"M": min(m, 72), "N": 32, "K": 256}, int4_product, int4_rivals, 5e-3, {"block": "128"},
                        {"a": "float16", "scales": "float16"}, target=target)
            )  # fmt: skip
    return found


def attention_cases() -> list[GpuCase]:
    """Return attention of one query per sequence, caches in int8 per token and in fp8 per tensor."""
    found = []
    tiny = {"B": 2, "H": 4, "G": 2, "S": 96, "D": 64}
    tokens = {"k_scale": "token", "v_scale": "token"}
    for batch, steps in ((16, 8192), (1, 32768)):
        dims = {"B": batch, "H": 32, "G": 8, "S": steps, "D": 128}
        for label, options in (("int8 per token", tokens), ("fp8 per tensor", {"cache": "float8e4m3fn"})):
            found.append(
                GpuCase("K6", "decode_attention", f"B={batch} S={steps} {label}", dims, tiny, attention,
                        attention_rivals, 1e-2, options, {"q": "float16"}, sensible_attention, "1.5x")
            )  # fmt: skip
    return found


def convolution_cases() -> list[GpuCase]:
    """Return layers of ResNet-50, batch 64 and 1."""
    found = []
    for batch in (64, 1):
        for side, inputs, outputs, window, stride in RESNET:
            pad = window // 2
            after = (side + 2 * pad - window) // stride + 1
            dims = {"N": batch, "H": side, "W": side, "P": after, "Q": after, "C": inputs, "D": inputs, "O": outputs}
            tiny_side = 8 + window
            tiny_after = (tiny_side + 2 * pad - window) // stride + 1
            tiny = {"N": 1, "H": tiny_side, "W": tiny_side, "P": tiny_after, "Q": tiny_after, "C": 16, "D": 16, "O": 16}
            options = {"offset": "channel", "activation": "relu", "pad": "zero" if pad else "none"}
            label = f"{window}x{window}/{stride} {inputs}->{outputs} at {side}, batch {batch}"
            taps = {"R": window, "S": window}
            found.append(
                GpuCase("K8", "int8_conv", label, dims | taps, tiny | taps, convolution, convolution_rivals,
                        1e-2, options, adjust=adjust_convolution(stride, pad), target="1.5x")  # type: ignore[arg-type]  # str options
            )  # fmt: skip
    return found


def all_cases() -> list[GpuCase]:
    """Return all cases: first the main one of each kernel, then the others, group by group."""
    groups = [product_cases(), memory_cases(), int4_cases(), attention_cases(), convolution_cases(), float_cases()]
    everything = [case for group in groups for case in group]
    first = {case.kernel: case for case in reversed(everything)}
    leading = [case for case in everything if first[case.kernel] is case]
    return leading + [case for case in everything if case not in leading]

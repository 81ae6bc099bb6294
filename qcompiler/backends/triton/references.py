"""Every kernel step on torch tensors of any device: exact integers, the epilogue as the kernels have it.

These are what the executor runs on a CPU, and where a kernel does not exist (yet). Sums of products are exact: float32
where their bound fits into 24 bits, in two halves or in float64 where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as nn
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import Call
from qcompiler.backends.triton.torch_ops.elementwise import cast_to
from qcompiler.backends.triton.torch_ops.quantization import dynamic_quantize
from qcompiler.backends.triton.torch_ops.windows import (
    max_pool,
    output_lengths,
    window_counts,
    window_of,
    window_sums,
)

Given = Mapping[str, Any]
Reference = Callable[[Given], tuple[Tensor, ...]]
_EXACT = float(1 << 24)
"""float32 holds every whole number up to here."""
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255)}


def finish(value: Tensor, given: Given) -> Tensor:
    """Turn scaled sums [..., N] into the output: bias, residual, activation, output scale, rounding."""
    if "bias" in given and isinstance(given["bias"], Tensor):
        value = value + given["bias"].to(torch.float32)
    if given.get("residual_when", "none") == "before":
        value = value + _residual(given)
    value = activate(value, given)
    if given.get("residual_when", "none") == "after":
        value = value + _residual(given)
    if given.get("out_scale", "folded") == "scalar":
        value = value * _single(given["out_inverse"])
    return store(value, str(given.get("out", "float32")), int(given.get("out_zero", 0)))


def _single(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _residual(given: Given) -> Tensor:
    stored: Tensor = given["residual"].to(torch.float32) - float(given["residual_zero"])
    return stored * _single(given["residual_scale"])


def activate(value: Tensor, given: Given) -> Tensor:
    """Apply the epilogue's activation."""
    match given.get("activation", "none"):
        case "relu":
            return torch.clamp(value, min=0)
        case "clip":
            return torch.clamp(value, _single(given["low"]), _single(given["high"]))
        case "leaky_relu":
            return torch.where(value < 0, value * _single(given["low"]), value)
        case "gelu":
            return nn.gelu(value)
        case "gelu_tanh":
            return nn.gelu(value, approximate="tanh")
        case "silu":
            return nn.silu(value)
        case "sigmoid":
            return torch.sigmoid(value)
        case "tanh":
            return torch.tanh(value)
        case "hard_swish":
            return value * torch.clamp(value / 6 + 0.5, 0, 1)
        case _:
            return value


def store(value: Tensor, dtype: str, zero: int) -> Tensor:
    """Round float32 numbers to an output dtype; 8-bit ones saturate, ties go to even."""
    if dtype in _LIMITS:
        low, high = _LIMITS[dtype]
        made = torch.round(torch.clamp(value, low - zero, high - zero)) + zero
        return made.to(torch.int8 if dtype == "int8" else torch.uint8)
    if dtype == "float8e4m3fn":
        return cast_to(value, 17)
    return value.to({"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32))


def exact_matmul(a: Tensor, w: Tensor) -> Tensor:
    """Multiply a [..., K] by w [N, K] transposed, both int8, exactly; float64 below 2**53, or float32 where it fits."""
    k = a.shape[-1]
    kind = torch.float32 if k * 128 * 128 < _EXACT else torch.float64
    return torch.matmul(a.to(kind), w.to(kind).T).to(torch.int64)


def _activations(given: Given) -> tuple[Tensor, ...]:
    """Multiply two activations, matrix by matrix, less their zero points."""
    a, w = given["a"], given["w_kn"] if "w_kn" in given else given["w"]
    a, w = (t.permute(*given[k]) if k in given else t for t, k in ((a, "a_axes"), (w, "w_axes")))
    w = w if "w_kn" in given else w.transpose(-1, -2)
    kind = torch.float32 if a.shape[-1] * 255 * 255 < _EXACT else torch.float64
    a, w = a.to(kind) - int(given.get("a_point", 0)), w.to(kind) - int(given.get("w_point", 0))
    made = finish(torch.matmul(a, w).to(torch.float32) * _single(given["scale"]), given)
    return (made.permute(*given["out_axes"]) if "out_axes" in given else made,)


def _float_matmul(given: Given) -> tuple[Tensor, ...]:
    """Multiply floats, matrix by matrix; sums in float32, operands not rounded to TF32."""
    a, w = given["a"], given["w_kn"] if "w_kn" in given else given["w"]
    a, w = (t.permute(*given[k]) if k in given else t for t, k in ((a, "a_axes"), (w, "w_axes")))
    w = w if "w_kn" in given else w.transpose(-1, -2)
    total = torch.matmul(a.to(torch.float32), w.to(torch.float32))
    if given.get("factor", "none") == "scalar":
        total = total * _single(given["scale"])
    made = finish(total, given)
    return (made.permute(*given["out_axes"]) if "out_axes" in given else made,)


def _int8_matmul(given: Given) -> tuple[Tensor, ...]:
    if given["multiplier"] == "scalar":
        return _activations(given)
    a, w = given["a"], given["w"].reshape(given["w"].shape[-2:])
    total = exact_matmul(a, w)
    if "a_zero_one" in given:
        total = total - given["a_zero_one"].to(torch.int64) * given["column_sum"].to(torch.int64)
    if isinstance(given.get("offset"), Tensor):
        total = total + given["offset"].to(torch.int64)
    factor = given["multiplier"]
    if "a_scale_one" in given:
        factor = given["a_scale_one"] * factor
    return (finish(total.to(torch.float32) * factor, given),)


def _fp8_matmul(given: Given) -> tuple[Tensor, ...]:
    a, w = given["a"].to(torch.float32), given["w"].to(torch.float32)
    total = torch.matmul(a, w.reshape(w.shape[-2:]).T)
    return (finish(total * given["multiplier"], given),)


def exact_conv(x: Tensor, w: Tensor, given: Given, group: int) -> Tensor:
    """Convolve whole numbers exactly: x [N, C, H, W] in -128 ... 127, w int8 [O, C / group, R, S]; int64."""
    strides = [int(given["stride_h"]), int(given["stride_w"])]
    dilations = [int(given["dilation_h"]), int(given["dilation_w"])]
    largest = float(w.to(torch.float64).abs().sum(dim=(1, 2, 3)).max()) if w.numel() else 0.0
    kind = torch.float32 if largest * 15 < _EXACT else torch.float64

    def convolve(part: Tensor) -> Tensor:
        return nn.conv2d(part.to(kind), w.to(kind), None, strides, 0, dilations, group)

    if largest * 128 < _EXACT or kind is torch.float64:
        return convolve(x).to(torch.int64)
    high = torch.floor(x / 16)
    return convolve(high).to(torch.int64) * 16 + convolve(x - high * 16).to(torch.int64)


def _int8_conv(given: Given) -> tuple[Tensor, ...]:
    x = given["x"].to(torch.float32).permute(0, 3, 1, 2)
    sides = [int(given[f"pad_{side}"]) for side in ("left", "right", "top", "bottom")]
    if any(sides):
        x = nn.pad(x, sides, value=float(given.get("x_zero", 0)))
    depthwise = given.get("kind") == "depthwise"
    w = given["w_rso"].permute(2, 0, 1).unsqueeze(1) if depthwise else given["w"].permute(0, 3, 1, 2)
    group = x.shape[1] if depthwise else int(given["group"])
    total = exact_conv(x.contiguous(), w.contiguous(), given, group).permute(0, 2, 3, 1)
    if isinstance(given.get("offset"), Tensor):
        total = total + given["offset"].to(torch.int64)
    return (finish(total.to(torch.float32) * given["multiplier"], given),)


def _float_conv(given: Given) -> tuple[Tensor, ...]:
    x = given["x"].to(torch.float32).permute(0, 3, 1, 2)
    sides = [int(given[f"pad_{side}"]) for side in ("left", "right", "top", "bottom")]
    if any(sides):
        x = nn.pad(x, sides)
    depthwise = given.get("kind") == "depthwise"
    w = given["w_rso"].permute(2, 0, 1).unsqueeze(1) if depthwise else given["w"].permute(0, 3, 1, 2)
    group = x.shape[1] if depthwise else int(given["group"])
    strides = [int(given["stride_h"]), int(given["stride_w"])]
    dilations = [int(given["dilation_h"]), int(given["dilation_w"])]
    total = nn.conv2d(x, w.to(torch.float32), None, strides, 0, dilations, group)
    return (finish(total.permute(0, 2, 3, 1), given),)


def _real(given: Given, name: str) -> Tensor:
    stored: Tensor = given[name].to(torch.float32) - float(given[f"{name}_zero"])
    return stored * _single(given[f"{name}_scale"])


def _pointwise(given: Given) -> tuple[Tensor, ...]:
    """Compute in float32 what ONNX computes operator by operator, or look up."""
    if given["op"] == "table":
        return (given["table"][given["x"].to(torch.int64) + (128 if given["x"].dtype is torch.int8 else 0)],)
    made = _real(given, "a")
    if given["op"] != "convert":
        other = _real(given, "b")
        made = made + other if given["op"] == "add" else made * other
    made, out = activate(made, given), str(given["out"])
    if out in ("int8", "uint8"):
        made = made / torch.tensor(given["out_scale"], dtype=torch.float32)
    return (store(made, out, int(given.get("out_zero", 0))),)


def _round(real: Tensor, given: Given) -> Tensor:
    """Quantize numbers known in float64: one rounding."""
    scaled = torch.round(real / _single(given["out_scale"])) + int(given["out_zero"])
    return scaled.clamp(-128, 127).to(torch.int8)


def _pool(given: Given) -> tuple[Tensor, ...]:
    last = given["layout"] == "NHWC"
    x = given["x"]
    x = x.permute(0, x.dim() - 1, *range(1, x.dim() - 1)) if last else x
    made = _POOLS[given["op"]](x, given)
    return (made.permute(0, *range(2, made.dim()), 1) if last else made,)


def _max(x: Tensor, given: Given) -> Tensor:
    return max_pool(Call("MaxPool", [x], given))[0]


def _average(x: Tensor, given: Given) -> Tensor:
    centred = x.to(torch.float64) - int(given["x_zero"])
    spatial = list(x.shape[2:])
    window = window_of(Call("AveragePool", [x], given), list(given["kernel_shape"]), spatial)
    lengths = output_lengths(window, spatial)
    with_pads = bool(given.get("count_include_pad", 0))
    counts = window_counts(window, spatial, lengths, with_pads, x.device).to(torch.float64)
    return _round(window_sums(centred.contiguous(), window, lengths) * _single(given["x_scale"]) / counts, given)


def _global_average(x: Tensor, given: Given) -> Tensor:
    axes = list(range(2, x.dim()))
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    sums = (x.to(torch.int64) - int(given["x_zero"])).sum(dim=axes, keepdim=True).to(torch.float64)
    return _round(sums * _single(given["x_scale"]) / max(count, 1), given)


_POOLS: Mapping[str, Callable[[Tensor, Given], Tensor]] = {
    "max": _max, "average": _average, "global_average": _global_average,
}  # fmt: skip


def _dynamic(given: Given) -> tuple[Tensor, ...]:
    q, scale, zero = dynamic_quantize(given["x"])
    return (q.to(torch.int16) - 128).to(torch.int8), scale, zero.to(torch.int32) - 128


def _norm_quantize(given: Given) -> tuple[Tensor, ...]:
    h = given["x"].to(torch.float32)
    if given.get("residual_when", "none") != "none":
        h = h + given["residual"].to(torch.float32)
    y = _normalize(h, given)
    out = str(given["out"])
    if given["scale"] == "static":
        ratio = y / _single(given["scale_number"])
        stored = store_ratio(ratio, out, int(given["zero"]))
    else:
        stored = y.to({"float16": torch.float16, "bfloat16": torch.bfloat16}.get(out, torch.float32))
    return stored, y.to(given["x"].dtype), h.to(given["x"].dtype)


def store_ratio(ratio: Tensor, dtype: str, zero: int) -> Tensor:
    """Round quotients as QuantizeLinear does."""
    if dtype == "int8":
        return (torch.round(ratio) + zero).clamp(-128, 127).to(torch.int8)
    return cast_to(ratio, 17)


def _normalize(h: Tensor, given: Given) -> Tensor:
    kind = given.get("norm", "none")
    if kind == "none":
        return h
    centred = h - h.mean(dim=-1, keepdim=True) if kind == "layer" else h
    variance = (centred * centred).mean(dim=-1, keepdim=True)
    y: Tensor = centred / torch.sqrt(variance + _single(given["eps"])) * given["gamma"].reshape(-1)
    return y + given["beta"].reshape(-1) if isinstance(given.get("beta"), Tensor) else y


def unpack_blocks(given: Given, depth: int) -> Tensor:
    """Return a packed weight [N, K] as numbers less their zero points, in float32."""
    if given["bits"] == "8":
        numbers = given["w8"].reshape(given["w8"].shape[0], -1)
    else:
        numbers = torch.cat([given["w"] & 0xF, given["w"] >> 4], dim=-1).reshape(given["w"].shape[0], -1)
    block = int(given["block"])
    if isinstance(given.get("zeros"), Tensor):
        zeros: Tensor = given["zeros"].T.repeat_interleave(block, dim=1)[:, :depth].to(torch.float32)
    else:
        zeros = torch.tensor(128.0 if given["bits"] == "8" else 8.0)
    stored: Tensor = numbers[:, :depth].to(torch.float32)
    return stored - zeros


def _blocks(given: Given) -> tuple[Tensor, ...]:
    depth = given["a"].shape[-1]
    scales = given["scales"].T.repeat_interleave(int(given["block"]), dim=1)[:, :depth].to(torch.float32)
    weight = unpack_blocks(given, depth) * scales
    return (finish(torch.matmul(given["a"].to(torch.float32), weight.T), given),)


REFERENCES: Mapping[str, Reference] = {
    "int8_matmul": _int8_matmul, "fp8_matmul": _fp8_matmul, "int8_conv": _int8_conv, "pointwise": _pointwise,
    "int8_pool": _pool, "dynamic_quantize": _dynamic, "norm_quantize": _norm_quantize, "int4_matmul": _blocks,
    "float_matmul": _float_matmul, "float_conv": _float_conv,
}  # fmt: skip
"""What each kernel step computes, by name."""

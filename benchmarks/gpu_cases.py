"""What is measured on a GPU: each kernel at the shapes that matter, its float64 reference and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Given = dict[str, Any]
Launch = Callable[[], Any]
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]
"""``torch.compile``, or what leaves a function as it is."""


@dataclass(frozen=True)
class GpuCase:
    """One kernel at one shape.

    Attributes:
        key: group of cases, such as ``K1``.
        kernel: its name.
        label: what is special about it.
        dims: length of each axis.
        tiny: the same for a dry run.
        expected: outputs in float64 from the arguments.
        rivals: functions that do the same by other means, the one to beat first.
        tolerance: greatest ||found - expected|| / ||expected||; integers may also differ by one step.
        options: of the kernel.
        dtypes: of arguments that leave a choice.
        adjust: makes random arguments sensible.
        target: what this project aims at, against the first rival.
    """

    key: str
    kernel: str
    label: str
    dims: Mapping[str, int]
    tiny: Mapping[str, int]
    expected: Callable[[Given], dict[str, Tensor]]
    rivals: Callable[[Given, Compiler], dict[str, Launch]]
    tolerance: float
    options: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    adjust: Callable[[Given], None] | None = None
    target: str = ""

    @property
    def name(self) -> str:
        """Return key, kernel and label."""
        return f"{self.key} {self.kernel} {self.label}"


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor as float64."""
    return tensor.to(torch.float64)


def rounded(value: Tensor, zero: int) -> Tensor:
    """Return saturate(rint(value) + zero) in s8, as float64."""
    return (value.round() + zero).clamp(-128, 127)


# ---- K1: int8 product ---------------------------------------------------------------------------------------------


def scale_product(given: Given) -> None:
    """Set the multiplier so that the outputs spread over the s8 range."""
    given["multiplier"].fill_(40.0 / (74.0**2 * given["a"].shape[-1] ** 0.5))


def int8_product(given: Given) -> dict[str, Tensor]:
    """Return relu((a @ w.T + offset) * multiplier), rounded."""
    total = wide(given["a"]) @ wide(given["w"]).transpose(-1, -2) + given["offset"]
    return {"out": rounded(torch.relu(total * wide(given["multiplier"])), given["out_zero"])}


def requantize(total: Tensor, offset: Tensor, multiplier: Tensor, zero: int) -> Tensor:
    """Do by torch what the kernel's epilogue does."""
    real = torch.relu((total + offset).to(torch.float32) * multiplier)
    return (real.round() + zero).clamp(-128, 127).to(torch.int8)


def int8_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuBLAS in int8, bare and with an epilogue in a kernel of its own, and in bfloat16."""
    a, w, rest = given["a"][0], given["w"][0].t(), (given["offset"], given["multiplier"], given["out_zero"])
    half, half_w = a.to(torch.bfloat16), given["w"][0].to(torch.bfloat16).t()
    fused = compiler(requantize)
    return {
        "_int_mm + compiled epilogue": lambda: fused(torch._int_mm(a, w), *rest),
        "_int_mm": lambda: torch._int_mm(a, w),
        "bf16 cuBLAS": lambda: half @ half_w,
    }


# ---- K2: fp8 product ----------------------------------------------------------------------------------------------


def fp8_product(given: Given) -> dict[str, Tensor]:
    """Return the product with scales of rows and columns."""
    total = wide(given["a"]) @ wide(given["w"]).transpose(-1, -2)
    return {"out": total * wide(given["a_scale"])[..., None] * wide(given["multiplier"])}


def fp8_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuBLAS in fp8 with the same scales, and in bfloat16."""
    a, w = given["a"][0], given["w"][0].t()
    rows, columns = given["a_scale"][0][:, None], given["multiplier"][None, :]
    half, half_w = a.to(torch.bfloat16), given["w"][0].to(torch.bfloat16).t()

    def scaled() -> Tensor:
        return torch._scaled_mm(a, w, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=a.is_cuda)

    return {"_scaled_mm row-wise": scaled, "bf16 cuBLAS": lambda: half @ half_w}


def block_product(given: Given) -> dict[str, Tensor]:
    """Return the product with scales of blocks of 128."""
    a = wide(given["a"]) * wide(given["a_blocks"]).repeat_interleave(128, -1)[..., : given["a"].shape[-1]]
    scale = wide(given["w_scale"]).repeat_interleave(128, 0).repeat_interleave(128, 1)
    w = wide(given["w"]) * scale[: given["w"].shape[1], : given["w"].shape[2]]
    return {"out": a @ w.transpose(-1, -2)}


def block_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return cuBLAS in bfloat16."""
    half, half_w = given["a"][0].to(torch.bfloat16), given["w"][0].to(torch.bfloat16).t()
    return {"bf16 cuBLAS": lambda: half @ half_w}


# ---- K3, K9: memory-bound -----------------------------------------------------------------------------------------


def norm_rows(given: Given) -> dict[str, Tensor]:
    """Return what rms norm of x + residual gives, quantized row by row."""
    kept = (given["x"].to(torch.float32) + given["residual"].to(torch.float32)).to(given["x"].dtype)
    h = wide(kept)
    y = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + given["eps"]) * wide(given["gamma"])
    scales = y.abs().amax(-1) / 127
    return {"out": rounded(y / scales[:, None], 0), "scales": scales, "kept": wide(kept)}


def norm_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return two kernels (norm, then quantization), one made by torch.compile, and a copy of the same bytes."""
    x, residual, gamma = given["x"], given["residual"], given["gamma"]

    def norm(x: Tensor, residual: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        kept = x + residual
        return F.rms_norm(kept, (kept.shape[-1],), gamma.to(kept.dtype), 1e-5), kept

    def quantize(y: Tensor) -> tuple[Tensor, Tensor]:
        scale = y.float().abs().amax(-1, keepdim=True) / 127
        return (y.float() / scale).round().to(torch.int8), scale

    first, second = compiler(norm), compiler(quantize)
    whole = compiler(lambda x, r, g: quantize(norm(x, r, g)[0]))
    return {
        "two compiled kernels": lambda: second(first(x, residual, gamma)[0]),
        "one compiled kernel": lambda: whole(x, residual, gamma),
        "copy of the same bytes": copy_of(given),
    }


def copy_of(given: Given) -> Launch:
    """Return a copy that moves as many bytes as the tensors of a call have."""
    total = sum(t.numel() * t.element_size() for t in given.values() if isinstance(t, Tensor))
    source = torch.empty(max(total // 2, 1), dtype=torch.uint8, device=given["out"].device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sensible_norm(given: Given) -> None:
    """Set epsilon and a gamma near 1."""
    given["eps"] = 1e-5
    given["gamma"].mul_(0.1).add_(1.0)


def sum_of_two(given: Given) -> dict[str, Tensor]:
    """Return relu(a + b) of quantized tensors."""
    parts = [(wide(given[n]) - given[f"{n}_zero"]) * given[f"{n}_scale"] for n in "ab"]
    return {"out": rounded(torch.relu(parts[0] + parts[1]) / given["out_scale"], given["out_zero"])}


def sum_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return a copy of the same bytes and what torch.compile makes of the sum."""
    numbers = [given[n] for n in ("a_zero", "a_scale", "b_zero", "b_scale", "out_scale", "out_zero")]

    def add(a: Tensor, b: Tensor) -> Tensor:
        a_zero, a_scale, b_zero, b_scale, scale, zero = numbers
        total = torch.relu((a.float() - a_zero) * a_scale + (b.float() - b_zero) * b_scale)
        return ((total / scale).round() + zero).clamp(-128, 127).to(torch.int8)

    fused, a, b = compiler(add), given["a"], given["b"]
    return {"copy of the same bytes": copy_of(given), "compiled": lambda: fused(a, b)}


def sensible_sum(given: Given) -> None:
    """Set scales that use the range of the output."""
    given |= {"a_scale": 0.05, "b_scale": 0.03, "out_scale": 0.07, "a_zero": 3, "b_zero": -5, "out_zero": -100}


def looked_up(given: Given) -> dict[str, Tensor]:
    """Return the table's entries."""
    return {"out": wide(given["table"][given["x"].long() + 128])}


def copy_rivals(given: Given, compiler: Compiler) -> dict[str, Launch]:
    """Return a copy of the same bytes."""
    return {"copy of the same bytes": copy_of(given)}


# ---- the list -----------------------------------------------------------------------------------------------------


def product_cases() -> list[GpuCase]:
    """Return the products of 8-bit operands."""
    requantizing = {"offset": "channel", "activation": "relu", "out": "int8"}
    tokens = {"a_scale": "token"}
    blocks = {"multiplier": "block", "a_scale": "block"}
    tiny = {"B": 1, "M": 64, "N": 64, "K": 128, "W": 1}
    found = []
    for m, n, k in ((4096, 4096, 4096), (8192, 8192, 8192), (64, 8192, 8192), (4096, 14336, 4096)):
        dims, shape = {"B": 1, "M": m, "N": n, "K": k, "W": 1}, f"{m}x{n}x{k}"
        found += [
            GpuCase("K1", "int8_matmul", f"{shape}, requantized", dims, tiny, int8_product, int8_rivals, 1e-2,
                    requantizing, adjust=scale_product, target="1.15x"),
            GpuCase("K2", "fp8_matmul", f"{shape}, per row", dims, tiny, fp8_product, fp8_rivals, 1e-2, tokens,
                    target="0.92x"),
        ]  # fmt: skip
        if m > 64:
            found.append(
                GpuCase("K2", "fp8_matmul", f"{shape}, per block", dims, tiny, block_product, block_rivals, 1e-2,
                        blocks, target="1.0x")
            )  # fmt: skip
    return found


def memory_cases() -> list[GpuCase]:
    """Return the norms and the pointwise kernels."""
    rms = {"norm": "rms", "residual": "keep"}
    brain = {"x": "bfloat16", "residual": "bfloat16", "gamma": "bfloat16"}
    found = [
        GpuCase("K3", "norm_quantize", f"{m}x{n}, rms of a sum, s8 per row", {"M": m, "N": n}, {"M": 16, "N": 128},
                norm_rows, norm_rivals, 1e-2, rms, brain, sensible_norm, "1.8x")
        for m, n in ((16384, 4096), (8192, 8192), (1, 4096))
    ]  # fmt: skip
    square = {"P": 1, "M": 8192, "N": 8192, "BP": 1, "BM": 8192, "BN": 8192}
    small = {"P": 1, "M": 16, "N": 64, "BP": 1, "BM": 16, "BN": 64}
    adding = {"op": "add", "activation": "relu", "arithmetic": "fast", "out": "int8"}
    found.append(
        GpuCase("K9", "pointwise", "add, relu, 64 MB each", square, small, sum_of_two, sum_rivals, 1e-2, adding,
                {"a": "int8", "b": "int8"}, sensible_sum, "0.85x")
    )  # fmt: skip
    found.append(
        GpuCase("K9", "pointwise", "table, 64 MB", square, small, looked_up, copy_rivals, 0.0,
                {"op": "table", "out": "int8"}, {"x": "int8"}, target="0.85x")
    )  # fmt: skip
    return found

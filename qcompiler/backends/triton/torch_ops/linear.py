"""Products and attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import Call, Function, one


def _matmul(call: Call) -> Tensor:
    return torch.matmul(call[0], call[1])


def _gemm(call: Call) -> Tensor:
    a = call[0].T if call.attr("transA", 0) else call[0]
    b = call[1].T if call.attr("transB", 0) else call[1]
    made = torch.matmul(a, b)
    alpha, beta, c = call.attr("alpha", 1.0), call.attr("beta", 1.0), call.get(2)
    made = made if alpha == 1.0 else (made * alpha).to(made.dtype)
    if c is None or beta == 0.0:
        return made
    return made + (c if beta == 1.0 else (c * beta).to(c.dtype))


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices of integers that are held in any type; exact below 2**53, as int32."""
    return torch.matmul(a.to(torch.float64), b.to(torch.float64)).to(torch.int32)


def _matmul_integer(call: Call) -> Tensor:
    a, b = call[0].to(torch.int32), call[1].to(torch.int32)
    az, bz = call.get(2), call.get(3)
    if az is not None:
        a = a - (az.to(torch.int32).unsqueeze(-1) if az.dim() == 1 and az.numel() > 1 else az.to(torch.int32))
    if bz is not None:
        b = b - bz.to(torch.int32)
    return exact_product(a, b)


def _einsum(call: Call) -> Tensor:
    tensors = [t for t in call.inputs if t is not None]
    return torch.einsum(str(call.attr("equation")).replace(" ", ""), *tensors)


def _determinant(call: Call) -> Tensor:
    made: Tensor = torch.linalg.det(call[0])
    return made


def _rotary(call: Call) -> Tensor:
    x, cos, sin = call[0], call[1], call[2]
    heads = int(call.attr("num_heads", 0))
    shape = x.shape
    x = x.reshape(shape[0], shape[1], heads, -1) if x.dim() == 3 else x.transpose(1, 2)
    ids = call.get(3)
    cos, sin = (cos, sin) if ids is None else (cos[ids], sin[ids])
    size = int(call.attr("rotary_embedding_dim", 0)) or x.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    cos, sin = (t[..., : size // 2].unsqueeze(2) for t in (cos, sin))
    if call.attr("interleaved", 0):
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).reshape(turned.shape)
    else:
        a, b = turned.chunk(2, dim=-1)
        made = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    made = torch.cat([made, rest], dim=-1)
    return made.reshape(shape) if len(shape) == 3 else made.transpose(1, 2)


LINEAR: Mapping[str, Function] = {
    name: one(function)
    for name, function in {
        "MatMul": _matmul, "Gemm": _gemm, "MatMulInteger": _matmul_integer, "Einsum": _einsum, "Det": _determinant,
        "RotaryEmbedding": _rotary,
    }.items()
}  # fmt: skip

"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import DTYPES, Call, Function, one
from qcompiler.backends.triton.torch_ops.elementwise import cast_to, widen

_FLOAT8 = {17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz, 19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz}
_LIMITS = {
    2: (0, 255),
    3: (-128, 127),
    4: (0, 65535),
    5: (-32768, 32767),
    21: (0, 15),
    22: (-8, 7),
    6: (-(2**31), 2**31 - 1),
}


def _spread(values: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Shape numbers per tensor, channel or block for broadcasting over x."""
    if values.numel() == 1 and values.dim() <= 1:
        return values.reshape(())
    axis %= x.dim()
    if block or values.dim() > 1:
        size = block or -(-x.shape[axis] // values.shape[axis])
        return values.repeat_interleave(size, dim=axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _number_of(dtype: torch.dtype) -> int:
    return next(number for number, found in DTYPES.items() if found is dtype)


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, to: int) -> Tensor:
    """Quantize as QuantizeLinear does; scale and zero point broadcast over x already.

    Args:
        x: floats.
        scale: float.
        zero: zero point in the output's type, or None.
        to: ONNX number of the output's type.
    """
    wide = x.to(torch.float32) / scale.to(torch.float32)
    if to in _FLOAT8:
        return cast_to(wide, to)
    low, high = _LIMITS[to]
    made = torch.round(wide)
    if zero is not None:
        made = made + widen(zero).to(torch.float32)
    return made.clamp(low, high).to(DTYPES[to])


def _quantize(call: Call) -> Tensor:
    x, scale, zero = call[0], call[1], call.get(2)
    to = int(call.attr("output_dtype", 0)) or (2 if zero is None else _number_of(zero.dtype))
    axis, block = int(call.attr("axis", 1)), int(call.attr("block_size", 0))
    spread_zero = None if zero is None or to in _FLOAT8 else _spread(widen(zero), x, axis, block)
    return quantize(x, _spread(scale, x, axis, block), spread_zero, to)


def _dequantize(call: Call) -> Tensor:
    q, scale, zero = call[0], call[1], call.get(2)
    axis, block = int(call.attr("axis", 1)), int(call.attr("block_size", 0))
    wide = q.to(torch.float32) if q.dtype in _FLOAT8.values() else widen(q).to(torch.int64)
    if zero is not None and q.dtype not in _FLOAT8.values():
        wide = wide - _spread(widen(zero), q, axis, block).to(torch.int64)
    to = int(call.attr("output_dtype", 0))
    made = wide.to(torch.float32) * _spread(scale, q, axis, block).to(torch.float32)
    return made.to(DTYPES[to] if to else scale.dtype)


def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to uint8 by the tensor's own range, widened to hold zero (DynamicQuantizeLinear), in float32."""
    low, high = torch.clamp(x.min(), max=0), torch.clamp(x.max(), min=0)
    scale = (high - low) / 255
    scale = torch.where(high == low, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    q = (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)
    return q, scale, zero.to(torch.uint8)


QUANTIZATION: Mapping[str, Function] = {
    "QuantizeLinear": one(_quantize),
    "DequantizeLinear": one(_dequantize),
    "DynamicQuantizeLinear": lambda call: dynamic_quantize(call[0]),
}

"""Operators on one element at a time, with NumPy's broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
import torch.nn.functional as nn
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import DTYPES, Call, Function, one

_WIDE = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
"""Types in which torch hardly computes, and the type that holds their sums."""


def _unary(function: Callable[[Tensor], Tensor]) -> Function:
    return lambda call: (function(call[0]),)


def widen(x: Tensor) -> Tensor:
    """Return a tensor in a type that torch computes in."""
    return x.to(_WIDE[x.dtype]) if x.dtype in _WIDE else x


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(call: Call) -> tuple[Tensor, ...]:
        made = function(widen(call[0]), widen(call[1]))
        return (made.to(call[0].dtype),)

    return run


def _compare(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    return lambda call: (function(widen(call[0]), widen(call[1])),)


def _many(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def run(call: Call) -> tuple[Tensor, ...]:
        tensors = [widen(t) for t in call.inputs if t is not None]
        return (reduce(function, tensors).clone().to(call[0].dtype),)

    return run


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(call: Call) -> Tensor:
    a, b = widen(call[0]), widen(call[1])
    made = torch.fmod(a, b) if call.attr("fmod", 0) else torch.remainder(a, b)
    return made.to(call[0].dtype)


def _pow(call: Call) -> Tensor:
    a, b = call[0], call[1]
    if a.is_floating_point() or not b.is_floating_point():
        return torch.pow(a, b.to(a.dtype) if a.is_floating_point() else b).to(a.dtype)
    return torch.pow(a.double(), b.double()).to(a.dtype)


def _mean(call: Call) -> Tensor:
    tensors = [t for t in call.inputs if t is not None]
    return reduce(torch.add, tensors) / len(tensors)


def _clip(call: Call) -> Tensor:
    x = call[0]
    low = call.get(1) if call.get(1) is not None else call.attr("min")
    high = call.get(2) if call.get(2) is not None else call.attr("max")
    made = widen(x)
    if low is not None:
        made = torch.maximum(made, torch.as_tensor(low, dtype=made.dtype, device=x.device))
    if high is not None:
        made = torch.minimum(made, torch.as_tensor(high, dtype=made.dtype, device=x.device))
    return made.to(x.dtype)


def _gelu(call: Call) -> Tensor:
    mode = call.attr("approximate", "none")
    return nn.gelu(call[0], approximate=mode if isinstance(mode, str) else mode.decode())


def _prelu(call: Call) -> Tensor:
    x, slope = call[0], call[1]
    return torch.where(x < 0, slope * x, x)


def _leaky_relu(call: Call) -> Tensor:
    x = call[0]
    return torch.where(x < 0, x * call.attr("alpha", 0.01), x)


def _elu(call: Call) -> Tensor:
    x = call[0]
    return torch.where(x > 0, x, call.attr("alpha", 1.0) * torch.expm1(x))


def _selu(call: Call) -> Tensor:
    x = call[0]
    alpha, gamma = call.attr("alpha", 1.67326319217681884765625), call.attr("gamma", 1.05070102214813232421875)
    return torch.where(x > 0, gamma * x, gamma * alpha * torch.expm1(x))


def _celu(call: Call) -> Tensor:
    x, alpha = call[0], call.attr("alpha", 1.0)
    return torch.clamp(x, min=0) + torch.clamp(alpha * torch.expm1(x / alpha), max=0)


def _hard_sigmoid(call: Call) -> Tensor:
    return torch.clamp(call[0] * call.attr("alpha", 0.2) + call.attr("beta", 0.5), 0, 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * torch.clamp(x * (1 / 6) + 0.5, 0, 1)


def _swish(call: Call) -> Tensor:
    x = call[0]
    return x * torch.sigmoid(call.attr("alpha", 1.0) * x)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _shrink(call: Call) -> Tensor:
    x, bias, edge = call[0], call.attr("bias", 0.0), call.attr("lambd", 0.5)
    zero = torch.zeros_like(x)
    return torch.where(x < -edge, (x + bias).to(x.dtype), torch.where(x > edge, (x - bias).to(x.dtype), zero))


def _thresholded(call: Call) -> Tensor:
    x = call[0]
    return torch.where(x > call.attr("alpha", 1.0), x, torch.zeros_like(x))


def _is_inf(call: Call) -> Tensor:
    x = call[0].float()
    made = torch.zeros_like(x, dtype=torch.bool)
    if call.attr("detect_positive", 1):
        made = made | (x == math.inf)
    if call.attr("detect_negative", 1):
        made = made | (x == -math.inf)
    return made


def _shift(call: Call) -> Tensor:
    a, b = call[0].to(torch.int64), call[1].to(torch.int64)
    left = call.attr("direction", "LEFT") in ("LEFT", b"LEFT")
    if left or call[0].dtype is not torch.uint64:
        return (a << b if left else a >> b).to(call[0].dtype)
    shifted = torch.where(b > 0, (a >> b) & ((1 << (63 - (b - 1).clamp(min=0))) - 1), a)
    return shifted.to(call[0].dtype)


def _where(call: Call) -> Tensor:
    a, b = call[1], call[2]
    return torch.where(call[0], widen(a), widen(b)).to(a.dtype)


_SATURATED = {17: 448.0, 18: 240.0, 19: 57344.0, 20: 57344.0}
"""Largest finite number of the 8-bit floats, to which a Cast saturates."""


def cast_to(x: Tensor, to: int, saturate: bool = True) -> Tensor:
    """Return a tensor in another ONNX type; to 8-bit floats round to nearest even, and saturate by default."""
    dtype = DTYPES[to]
    if to not in _SATURATED:
        return (x != 0) if dtype is torch.bool else _to_integers(x, dtype)
    wide = x.to(torch.float32)
    limit = _SATURATED[to]
    if saturate:
        wide = torch.where(wide.isnan(), wide, wide.clamp(-limit, limit))
    elif dtype is torch.float8_e4m3fn:  # it has no infinity: beyond half a step above the largest number is NaN
        wide = torch.where(wide.abs() > limit + 16, torch.nan, wide)
    return wide.to(dtype)


def _to_integers(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_floating_point() and not dtype.is_floating_point:
        return x.to(torch.int64).to(dtype)
    return x.to(dtype)


def _cast(call: Call) -> Tensor:
    return cast_to(call[0], int(call.attr("to")), bool(call.attr("saturate", 1)))


def _cast_like(call: Call) -> Tensor:
    to = next(number for number, dtype in DTYPES.items() if dtype is call[1].dtype)
    return cast_to(call[0], to, bool(call.attr("saturate", 1)))


_UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round,
    "Sign": torch.sign, "Sqrt": torch.sqrt, "Reciprocal": torch.reciprocal, "Exp": torch.exp, "Log": torch.log,
    "Sin": torch.sin, "Cos": torch.cos, "Tan": torch.tan, "Asin": torch.asin, "Acos": torch.acos,
    "Atan": torch.atan, "Sinh": torch.sinh, "Cosh": torch.cosh, "Asinh": torch.asinh, "Acosh": torch.acosh,
    "Atanh": torch.atanh, "Erf": torch.erf, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh,
    "Relu": lambda x: torch.clamp(x, min=0), "HardSwish": _hard_swish, "Softplus": _softplus,
    "Softsign": nn.softsign, "Mish": lambda x: x * torch.tanh(_softplus(x)), "Not": torch.logical_not,
    "IsNaN": torch.isnan, "BitwiseNot": lambda x: torch.bitwise_not(widen(x)).to(x.dtype),
    "Identity": lambda x: x,
}  # fmt: skip

_BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "BitwiseAnd": torch.bitwise_and,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip

_COMPARISONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq, "Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge,
    "LessOrEqual": torch.le, "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip

ELEMENTWISE: Mapping[str, Function] = {
    **{name: _unary(function) for name, function in _UNARY.items()},
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{name: _compare(function) for name, function in _COMPARISONS.items()},
    "Min": _many(torch.minimum), "Max": _many(torch.maximum), "Sum": _many(torch.add), "Mean": one(_mean),
    "Mod": one(_mod), "Pow": one(_pow), "Clip": one(_clip), "Gelu": one(_gelu), "PRelu": one(_prelu),
    "LeakyRelu": one(_leaky_relu), "Elu": one(_elu), "Selu": one(_selu), "Celu": one(_celu), "Swish": one(_swish),
    "HardSigmoid": one(_hard_sigmoid), "Shrink": one(_shrink), "ThresholdedRelu": one(_thresholded),
    "IsInf": one(_is_inf), "BitShift": one(_shift), "Where": one(_where), "Cast": one(_cast),
    "CastLike": one(_cast_like),
}  # fmt: skip

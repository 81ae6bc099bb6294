"""Operators that reduce or normalize along axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as nn
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import Call, Function, one
from qcompiler.backends.triton.torch_ops.elementwise import widen


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return x.sum(dim=axes, keepdim=keep, dtype=x.dtype)


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(dim=axis, keepdim=keep, dtype=x.dtype)
    return x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(dim=axes, keepdim=keep)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return torch.div(x.sum(dim=axes, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _extreme(x: Tensor, axes: list[int], keep: bool, largest: bool) -> Tensor:
    if x.dtype is torch.bool:
        return _extreme(x.to(torch.uint8), axes, keep, largest).to(torch.bool)
    if any(x.shape[a] == 0 for a in axes):
        shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
        edge = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        empty = float("-inf" if largest else "inf") if x.is_floating_point() else edge.min if largest else edge.max
        return torch.full(shape, empty, dtype=x.dtype, device=x.device)
    return torch.amax(x, axes, keep) if largest else torch.amin(x, axes, keep)


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x, dim=axes, keepdim=keep)


_REDUCERS: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceSum": _sum,
    "ReduceProd": _product,
    "ReduceMean": _mean,
    "ReduceMax": lambda x, axes, keep: _extreme(x, axes, keep, True),
    "ReduceMin": lambda x, axes, keep: _extreme(x, axes, keep, False),
    "ReduceL1": lambda x, axes, keep: _sum(x.abs(), axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(_sum(x * x, axes, keep)).to(x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: _sum(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(_sum(x, axes, keep)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _reduce(name: str) -> Function:
    def run(call: Call) -> tuple[Tensor, ...]:
        x, axes = call[0], call.axes()
        if not axes:
            if call.attr("noop_with_empty_axes", 0):
                return (x,) if name not in _NOT_IDENTITY else (_REDUCERS[name](x.unsqueeze(0), [0], False),)
            axes = list(range(x.dim()))
        axes = [a % x.dim() for a in axes] if x.dim() else []
        if not axes:
            return (_REDUCERS[name](x.reshape(1), [0], False),)
        return (_REDUCERS[name](x, axes, bool(call.attr("keepdims", 1))),)

    return run


_NOT_IDENTITY = frozenset({"ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"})
"""Reductions that change a number that they reduce alone."""


def _arg(largest: bool) -> Function:
    def run(call: Call) -> tuple[Tensor, ...]:
        x, axis = widen(call[0]), int(call.attr("axis", 0))
        last = bool(call.attr("select_last_index", 0))
        x = x.flip(axis) if last else x
        # Sorting stably gives the first of equal numbers on every device.
        place = torch.sort(x, dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, 1)
        place = x.shape[axis] - 1 - place if last else place
        return (place if call.attr("keepdims", 1) else place.squeeze(axis),)

    return run


def _softmax(call: Call) -> Tensor:
    return torch.softmax(call[0], int(call.attr("axis", -1)))


def _log_softmax(call: Call) -> Tensor:
    return torch.log_softmax(call[0], int(call.attr("axis", -1)))


def _hardmax(call: Call) -> Tensor:
    x, axis = call[0], int(call.attr("axis", -1))
    place = torch.sort(x, dim=axis, descending=True, stable=True).indices.narrow(axis, 0, 1)
    return torch.zeros_like(x).scatter(axis, place, 1)


def _layer_norm(call: Call) -> tuple[Tensor, ...]:
    x, axis = call[0], int(call.attr("axis", -1))
    axis %= x.dim()
    axes = list(range(axis, x.dim()))
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = wide.mean(dim=axes, keepdim=True)
    spread = wide - mean
    inverse = torch.rsqrt((spread * spread).mean(dim=axes, keepdim=True) + call.attr("epsilon", 1e-5))
    made = (spread * inverse).to(x.dtype) * call[1]
    bias = call.get(2)
    made = made if bias is None else made + bias
    return (made, mean, inverse)[: call.outputs]


def _rms_norm(call: Call) -> Tensor:
    x, axis = call[0], int(call.attr("axis", -1)) % call[0].dim()
    axes = list(range(axis, x.dim()))
    wide = x.to(torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt((wide * wide).mean(dim=axes, keepdim=True) + call.attr("epsilon", 1e-5))
    return (wide * inverse).to(x.dtype) * call[1]


def _channels(values: Tensor, rank: int) -> Tensor:
    return values.reshape([-1 if i == 1 else 1 for i in range(rank)])


def _batch_norm(call: Call) -> tuple[Tensor, ...]:
    x, more = call[0], []
    scale, bias, mean, variance = (_channels(call[i], x.dim()) for i in range(1, 5))
    if call.attr("training_mode", 0):
        axes, share = [i for i in range(x.dim()) if i != 1], call.attr("momentum", 0.9)
        own = x.mean(dim=axes, keepdim=True), x.var(dim=axes, keepdim=True, unbiased=False)
        more = [(r * share + o * (1 - share)).reshape(-1) for r, o in zip((mean, variance), own, strict=True)]
        mean, variance = own
    made = (x - mean) / torch.sqrt(variance + call.attr("epsilon", 1e-5)) * scale + bias
    return made.to(x.dtype), *more


def _instance_norm(call: Call) -> Tensor:
    x = call[0]
    axes = list(range(2, x.dim()))
    mean = x.mean(dim=axes, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=axes, keepdim=True)
    made = (x - mean) / torch.sqrt(variance + call.attr("epsilon", 1e-5))
    return made * _channels(call[1], x.dim()) + _channels(call[2], x.dim())


def _group_norm(call: Call) -> Tensor:
    x, groups = call[0], int(call.attr("num_groups"))
    parts = x.reshape(x.shape[0], groups, -1)
    mean = parts.mean(dim=2, keepdim=True)
    variance = ((parts - mean) ** 2).mean(dim=2, keepdim=True)
    made = ((parts - mean) / torch.sqrt(variance + call.attr("epsilon", 1e-5))).reshape(x.shape)
    scale, bias = call[1], call[2]
    if scale.numel() == groups and groups != x.shape[1]:  # per group, below opset 21
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return made * _channels(scale, x.dim()) + _channels(bias, x.dim())


def _lp_norm(call: Call) -> Tensor:
    x, axis, p = call[0], int(call.attr("axis", -1)), int(call.attr("p", 2))
    size = x.abs().sum(dim=axis, keepdim=True) if p == 1 else torch.sqrt((x * x).sum(dim=axis, keepdim=True))
    return torch.where(size == 0, torch.zeros_like(x), x / size)


def _mean_variance(call: Call) -> Tensor:
    x, axes = call[0], list(call.attr("axes", (0, 2, 3)))
    mean = x.mean(dim=axes, keepdim=True)
    variance = (x * x).mean(dim=axes, keepdim=True) - mean * mean
    return (x - mean) / (torch.sqrt(variance) + 1e-9)


def _lrn(call: Call) -> Tensor:
    x, size = call[0], int(call.attr("size"))
    before = (size - 1) // 2
    squares = nn.pad((x * x).transpose(1, -1), (before, size - 1 - before)).transpose(1, -1)
    sums = sum(squares.narrow(1, i, x.shape[1]) for i in range(size))
    made: Tensor = x / (call.attr("bias", 1.0) + call.attr("alpha", 1e-4) / size * sums) ** call.attr("beta", 0.75)
    return made


REDUCING: Mapping[str, Function] = {
    **{name: _reduce(name) for name in _REDUCERS},
    "ArgMax": _arg(True), "ArgMin": _arg(False), "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    **{
        name: one(function)
        for name, function in {
            "Softmax": _softmax, "LogSoftmax": _log_softmax, "Hardmax": _hardmax, "RMSNormalization": _rms_norm,
            "InstanceNormalization": _instance_norm,
            "GroupNormalization": _group_norm, "LpNormalization": _lp_norm,
            "MeanVarianceNormalization": _mean_variance, "LRN": _lrn,
        }.items()
    },
}  # fmt: skip

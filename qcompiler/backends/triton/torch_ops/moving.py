"""Operators that move, select or make elements."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import DTYPES, Call, Function, one
from qcompiler.backends.triton.torch_ops.elementwise import widen


def _reshape(call: Call) -> Tensor:
    x, shape = call[0], call.numbers(1) or []
    if not call.attr("allowzero", 0):
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    if -1 in shape and x.numel() == 0:
        known = 1
        for n in shape:
            known *= n if n > 0 else 1
        shape = [0 if n == -1 else n for n in shape] if known else shape
    return x.reshape(shape)


def _flatten(call: Call) -> Tensor:
    x, axis = call[0], int(call.attr("axis", 1))
    axis = axis % x.dim() if axis < 0 else axis
    rows = 1
    for n in x.shape[:axis]:
        rows *= n
    columns = 1
    for n in x.shape[axis:]:
        columns *= n
    return x.reshape(rows, columns)


def _squeeze(call: Call) -> Tensor:
    x, axes = call[0], call.axes()
    drop = {i for i, n in enumerate(x.shape) if n == 1} if axes is None else {a % x.dim() for a in axes}
    return x.reshape([n for i, n in enumerate(x.shape) if i not in drop])


def _unsqueeze(call: Call) -> Tensor:
    x, axes = call[0], call.axes() or []
    rank = x.dim() + len(axes)
    new = {a % rank for a in axes}
    lengths = iter(x.shape)
    return x.reshape([1 if i in new else next(lengths) for i in range(rank)])


def _transpose(call: Call) -> Tensor:
    x = call[0]
    return x.permute(tuple(call.attr("perm") or range(x.dim())[::-1]))


def _concat(call: Call) -> Tensor:
    parts = [t for t in call.inputs if t is not None]
    return torch.cat(parts, dim=int(call.attr("axis", 0)))


def _split(call: Call) -> tuple[Tensor, ...]:
    x, axis = call[0], int(call.attr("axis", 0))
    sizes = call.numbers(1) or call.attr("split")
    if sizes is None:
        count = int(call.attr("num_outputs") or call.outputs)
        each = -(-x.shape[axis] // count)
        sizes = [max(min(each, x.shape[axis] - i * each), 0) for i in range(count)]
    return tuple(torch.split(x, list(sizes), dim=axis))


def _slice(call: Call) -> Tensor:
    x = call[0]
    starts, ends = call.numbers(1), call.numbers(2)
    starts = call.attr("starts") if starts is None else starts
    ends = call.attr("ends") if ends is None else ends
    axes = call.axes(3) or list(range(len(starts)))
    steps = call.numbers(4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _slice_axis(x, range(x.shape[axis])[slice(*_bounds(start, end, step, x.shape[axis]))], axis)
    return x


def _bounds(start: int, end: int, step: int, length: int) -> tuple[int, int | None, int]:
    """Return a Python slice: ONNX clamps, and a negative step may end before the first element."""
    start = start + length if start < 0 else start
    end = end + length if end < 0 else end
    if step > 0:
        return min(max(start, 0), length), min(max(end, 0), length), step
    last = None if end < 0 else min(end, length - 1)
    return min(max(start, 0), length - 1), last, step


def _slice_axis(x: Tensor, chosen: range, axis: int) -> Tensor:
    if chosen.step > 0:
        index: list[slice] = [slice(None)] * x.dim()
        index[axis] = slice(chosen.start, max(chosen.stop, chosen.start), chosen.step)
        return x[tuple(index)]
    return x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))


def _gather(call: Call) -> Tensor:
    x, indices, axis = call[0], call[1].to(torch.int64), int(call.attr("axis", 0))
    axis %= x.dim()
    flat = indices.reshape(-1)
    flat = torch.where(flat < 0, flat + x.shape[axis], flat)
    made = x.index_select(axis, flat)
    return made.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _positive(indices: Tensor, length: int) -> Tensor:
    wide = indices.to(torch.int64)
    return torch.where(wide < 0, wide + length, wide)


def _gather_elements(call: Call) -> Tensor:
    x, axis = call[0], int(call.attr("axis", 0))
    return torch.gather(x, axis, _positive(call[1], x.shape[axis]))


def _gather_nd(call: Call) -> Tensor:
    x, indices, batch = call[0], call[1].to(torch.int64), int(call.attr("batch_dims", 0))
    depth = indices.shape[-1]
    lead = x.shape[:batch]
    rows = 1
    for n in lead:
        rows *= n
    flat, index = x.reshape(rows, *x.shape[batch:]), indices.reshape(rows, -1, depth)
    numbers = torch.arange(rows, device=x.device).reshape(-1, 1).expand(rows, index.shape[1])
    made = flat[(numbers, *(_positive(index[..., i], flat.shape[1 + i]) for i in range(depth)))]
    return made.reshape((*lead, *indices.shape[batch:-1], *x.shape[batch + depth :]))


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scatter_elements(call: Call) -> Tensor:
    x, axis = call[0], int(call.attr("axis", 0))
    index, updates = _positive(call[1], x.shape[axis]), call[2]
    reduction = call.attr("reduction", "none")
    if reduction == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])


def _scatter_nd(call: Call) -> Tensor:
    x, indices, updates = call[0].clone(), call[1].to(torch.int64), call[2]
    depth = indices.shape[-1]
    rest = x.shape[depth:]
    size = 1
    for n in rest:
        size *= n
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(depth):
        rows = rows * x.shape[i] + _positive(indices[..., i], x.shape[i])
    index = rows.reshape(-1, 1).expand(-1, size)
    flat, new = x.reshape(-1, size), updates.reshape(-1, size)
    reduction = call.attr("reduction", "none")
    made = flat.scatter(0, index, new)
    if reduction != "none":
        made = flat.scatter_reduce(0, index, new, _REDUCTIONS[reduction])
    return made.reshape(x.shape)


def _expand(call: Call) -> Tensor:
    x, shape = call[0], call.numbers(1) or []
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(shape)))


def _tile(call: Call) -> Tensor:
    return call[0].repeat(call.numbers(1) or [])


def _pad(call: Call) -> Tensor:
    x, pads = call[0], call.numbers(1) or call.attr("pads")
    mode = call.attr("mode", "constant")
    axes = call.numbers(3)
    axes = list(range(x.dim())) if axes is None else [a % x.dim() for a in axes]
    value = call.get(2)
    for i, axis in enumerate(axes):
        x = _pad_axis(x, axis, pads[i], pads[i + len(axes)], mode, value)
    return x


def _pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str, value: Tensor | None) -> Tensor:
    length = x.shape[axis]
    x = x.narrow(axis, max(-before, 0), length - max(-before, 0) - max(-after, 0))
    before, after, length = max(before, 0), max(after, 0), x.shape[axis]
    if before == after == 0:
        return x
    if mode == "constant":
        shapes = [list(x.shape), list(x.shape)]
        shapes[0][axis], shapes[1][axis] = before, after
        number = torch.zeros((), dtype=x.dtype, device=x.device) if value is None else value.reshape(()).to(x.device)
        head, tail = (number.expand(shape) for shape in shapes)
        return torch.cat([head, x, tail], dim=axis)
    places = torch.arange(-before, length + after, device=x.device)
    if mode == "edge":
        places = places.clamp(0, length - 1)
    elif mode == "wrap":
        places = places % length
    else:
        period = max(2 * (length - 1), 1)
        places = places % period
        places = torch.where(places >= length, period - places, places)
    return x.index_select(axis, places)


def _shape(call: Call) -> Tensor:
    x = call[0]
    start, end = int(call.attr("start", 0)), call.attr("end")
    return torch.tensor(list(x.shape)[start : None if end is None else int(end)], dtype=torch.int64)


def _range(call: Call) -> Tensor:
    start, step = call[0], call[2]
    first, limit, stride = (call.scalar(i) for i in range(3))
    count = max(int(-(-(limit - first) // stride)), 0)
    made = start + torch.arange(count, device=start.device).to(start.dtype) * step
    return made.to(start.dtype)


def _constant_of_shape(call: Call) -> Tensor:
    value = call.attr("value")
    shape = call.numbers(0) or []
    if value is None:
        return torch.zeros(shape, dtype=torch.float32, device=call[0].device)
    return torch.as_tensor(value).reshape(-1)[0].expand(shape).clone()


def _depth_to_space(call: Call) -> Tensor:
    x, b = call[0], int(call.attr("blocksize"))
    n, c, h, w = x.shape
    if call.attr("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * b, w * b)
    return x.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, -1, h * b, w * b)


def _space_to_depth(call: Call) -> Tensor:
    x, b = call[0], int(call.attr("blocksize"))
    n, c, h, w = x.shape
    order = (0, 3, 5, 1, 2, 4) if call.attr("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).permute(order).reshape(n, c * b * b, h // b, w // b)


def _trilu(call: Call) -> Tensor:
    k = call.numbers(1)
    offset = k[0] if k else 0
    x = call[0]
    return torch.triu(x, offset) if call.attr("upper", 1) else torch.tril(x, offset)


def _eye_like(call: Call) -> Tensor:
    x = call[0]
    to = call.attr("dtype")
    made = torch.zeros(x.shape, dtype=x.dtype if to is None else DTYPES[int(to)], device=x.device)
    diagonal = made.diagonal(int(call.attr("k", 0)))
    diagonal.fill_(1)
    return made


def _one_hot(call: Call) -> Tensor:
    indices, depth, values = call[0].to(torch.int64), int(call.scalar(1)), call[2]
    axis = int(call.attr("axis", -1)) % (indices.dim() + 1)
    places = torch.where(indices < 0, indices + depth, indices).unsqueeze(axis)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = depth
    hot = places == torch.arange(depth, device=indices.device).reshape(shape)
    return torch.where(hot, values[1], values[0])


def _nonzero(call: Call) -> Tensor:
    x = call[0]
    return torch.nonzero(x).T.contiguous() if x.dim() else torch.nonzero(x.reshape(1)).T[:0]


def _topk(call: Call) -> tuple[Tensor, ...]:
    x, axis = call[0], int(call.attr("axis", -1))
    count = (call.numbers(1) or [int(call.attr("k", 1))])[0]
    # A stable sort: of equal numbers the one with the lower index comes first, as the operator says.
    values, places = torch.sort(widen(x), dim=axis, descending=bool(call.attr("largest", 1)), stable=True)
    return values.narrow(axis, 0, count).to(x.dtype), places.narrow(axis, 0, count)


def _cumsum(call: Call) -> Tensor:
    x, axis = call[0], int(call.scalar(1))
    back = bool(call.attr("reverse", 0))
    x = x.flip(axis) if back else x
    made = torch.cumsum(x, dim=axis).to(x.dtype)
    if call.attr("exclusive", 0):
        made = made - x
    return made.flip(axis) if back else made


def _compress(call: Call) -> Tensor:
    x, axis = call[0], call.attr("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, int(axis))
    chosen = torch.nonzero(call[1].reshape(-1)).reshape(-1)
    return x.index_select(axis, chosen)


def _reverse_sequence(call: Call) -> Tensor:
    x, lengths = call[0], call.numbers(1) or []
    time, batch = int(call.attr("time_axis", 0)), int(call.attr("batch_axis", 1))
    made = x.clone()
    for i, length in enumerate(lengths):
        row = made.select(batch, i)
        axis = time - (1 if time > batch else 0)
        row.narrow(axis, 0, length).copy_(x.select(batch, i).narrow(axis, 0, length).flip(axis))
    return made


def _dropout(call: Call) -> tuple[Tensor, ...]:
    if call.get(2) is not None and bool(call.scalar(2)):
        raise ValueError("Dropout in training mode has no step")
    return call[0], torch.ones_like(call[0], dtype=torch.bool)


def _constant(call: Call) -> Tensor:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = call.attr(name)
        if value is not None:
            kind = torch.float32 if "float" in name else torch.int64
            return torch.as_tensor(value) if name == "value" else torch.tensor(value, dtype=kind)
    raise ValueError("Constant has no value that is a tensor")


MOVING: Mapping[str, Function] = {
    "Split": _split, "TopK": _topk, "Dropout": _dropout,
    **{
        name: one(function)
        for name, function in {
            "Reshape": _reshape, "Flatten": _flatten, "Squeeze": _squeeze, "Unsqueeze": _unsqueeze,
            "Transpose": _transpose, "Concat": _concat, "Slice": _slice, "Gather": _gather,
            "GatherElements": _gather_elements, "GatherND": _gather_nd, "ScatterElements": _scatter_elements,
            "ScatterND": _scatter_nd, "Expand": _expand, "Tile": _tile, "Pad": _pad, "Shape": _shape,
            "Size": lambda call: torch.tensor(call[0].numel(), dtype=torch.int64), "Range": _range,
            "ConstantOfShape": _constant_of_shape, "DepthToSpace": _depth_to_space, "SpaceToDepth": _space_to_depth,
            "Trilu": _trilu, "EyeLike": _eye_like, "OneHot": _one_hot, "NonZero": _nonzero, "CumSum": _cumsum,
            "Compress": _compress, "ReverseSequence": _reverse_sequence, "Constant": _constant,
        }.items()
    },
}  # fmt: skip

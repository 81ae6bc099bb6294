"""Resize: one matrix of weights per axis, made by the specification's formulas, or an index where it selects."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import Call, Function, one
from qcompiler.engine import Array


def output_shape(call: Call) -> tuple[list[int], list[float], list[int]]:
    """Return (output lengths, scales, axes) along the axes that are resized."""
    x = call[0]
    axes = [a % x.dim() for a in call.attr("axes") or range(x.dim())]
    given, sizes = call.contents(2), call.numbers(3)
    lengths = [x.shape[a] for a in axes]
    if sizes:
        policy = call.attr("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            pick = min if policy == "not_larger" else max
            ratio = pick(Fraction(s, n) for s, n in zip(sizes, lengths, strict=True))
            return [int(ratio * n + Fraction(1, 2)) for n in lengths], [float(ratio)] * len(axes), axes
        return sizes, [s / n for s, n in zip(sizes, lengths, strict=True)], axes
    scales = [float(s) for s in given] if given is not None else [1.0] * len(axes)
    return [int(n * s) for n, s in zip(lengths, scales, strict=True)], scales, axes


def _places(mode: str, count: int, scale: float, length: int, roi: tuple[float, float]) -> Array:
    """Return the place in the input that each output element stands at, float64 [count]."""
    out = np.arange(count, dtype=np.float64)
    if mode == "asymmetric":
        return out / scale
    if mode == "align_corners":
        exact = length * scale
        return out * (length - 1) / (exact - 1) if exact != 1 else np.zeros(count)
    if mode == "pytorch_half_pixel":
        return (out + 0.5) / scale - 0.5 if count > 1 else np.full(count, -0.5)
    if mode == "tf_crop_and_resize":
        start, end = roi
        if count > 1:
            return start * (length - 1) + out * (end - start) * (length - 1) / (count - 1)
        return np.full(count, 0.5 * (start + end) * (length - 1))
    if mode == "half_pixel_symmetric":
        adjustment = count / (scale * length)
        centre = length / 2
        return centre * (1 - adjustment) + (out + 0.5) / scale - 0.5
    return (out + 0.5) / scale - 0.5


def _rounded(places: Array, mode: str) -> Array:
    if mode == "round_prefer_ceil":
        return np.floor(places + 0.5)
    if mode == "floor":
        return np.floor(places)
    if mode == "ceil":
        return np.ceil(places)
    return np.ceil(places - 0.5)


def _kernel(mode: str, scale: float, antialias: bool) -> tuple[int, float]:
    """Return (taps on each side, stretch) of an interpolation."""
    stretch = min(scale, 1.0) if antialias else 1.0
    reach = 1 if mode == "linear" else 2
    return int(np.ceil(reach / stretch)), stretch


def _weight(distance: Array, mode: str, a: float) -> Array:
    d = np.abs(distance)
    if mode == "linear":
        return np.asarray(np.maximum(1 - d, 0))
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _matrix(places: Array, length: int, mode: str, scale: float, call: Call) -> Array:
    """Return weights [count, length], float64: each row interpolates one output element."""
    a = float(call.attr("cubic_coeff_a", -0.75))
    reach, stretch = _kernel(mode, scale, bool(call.attr("antialias", 0)))
    exclude = bool(call.attr("exclude_outside", 0))
    base = np.floor(places).astype(np.int64)
    taps = np.arange(-reach + 1, reach + 1)
    index = base[:, None] + taps[None]
    weights = _weight((index - places[:, None]) * stretch, mode, a)
    if exclude:
        weights = np.where((index >= 0) & (index < length), weights, 0.0)
    total = weights.sum(axis=1, keepdims=True)
    weights = weights / np.where(total == 0, 1.0, total)
    made = np.zeros((len(places), length))
    np.add.at(made, (np.arange(len(places))[:, None], np.clip(index, 0, length - 1)), weights)
    return made


def _resize(call: Call) -> Tensor:
    x = call[0]
    counts, scales, axes = output_shape(call)
    mode = call.attr("mode", "nearest")
    transformation = call.attr("coordinate_transformation_mode", "half_pixel")
    corners = [float(v) for v in call.contents(1) or []]
    made, outside = x, []
    for place, (axis, count, scale) in enumerate(zip(axes, counts, scales, strict=True)):
        window = (corners[place], corners[place + len(axes)]) if corners else (0.0, 1.0)
        cropped = transformation == "tf_crop_and_resize"
        if count == x.shape[axis] and scale == 1.0 and not cropped:
            continue
        places = _places(transformation, count, scale, x.shape[axis], window)
        if cropped:
            outside.append((axis, (places < 0) | (places > x.shape[axis] - 1)))
        made = _along(made, axis, places, mode, scale, call)
    made = made.to(x.dtype)
    for axis, where in outside:
        shape = [-1 if i == axis else 1 for i in range(x.dim())]
        mask = call.table(f"outside {axis}", partial(torch.from_numpy, where)).reshape(shape)
        made = torch.where(mask, torch.tensor(call.attr("extrapolation_value", 0.0), dtype=made.dtype), made)
    return made


def _along(x: Tensor, axis: int, places: Array, mode: str, scale: float, call: Call) -> Tensor:
    length = x.shape[axis]
    if mode == "nearest":
        chosen = np.clip(_rounded(places, call.attr("nearest_mode", "round_prefer_floor")), 0, length - 1)
        return x.index_select(axis, call.table(f"places {axis}", lambda: torch.from_numpy(chosen.astype(np.int64))))
    weights = call.table(f"weights {axis}", lambda: torch.from_numpy(_matrix(places, length, mode, scale, call)))
    wide = x.to(torch.float64)
    made: Tensor = torch.tensordot(wide, weights, dims=([axis], [1])).movedim(-1, axis)
    return made


RESIZING: Mapping[str, Function] = {"Resize": one(_resize)}

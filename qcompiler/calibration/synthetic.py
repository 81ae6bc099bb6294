"""Feeds without data: smooth pictures and signals, tokens of the right table, scales that batch statistics ask for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.calibration.evidence import (
    Double,
    Scale,
    compared_constants,
    find_scale,
    is_size,
    quantized_range,
    table_size,
    wanted_shape,
)
from qcompiler.calibration.feed_source import FeedSource
from qcompiler.calibration.open_axes import check_inventable, open_lengths
from qcompiler.calibration.smooth import EDGE, is_pictured, is_signal, unit
from qcompiler.calibration.texts import MASK, POSITIONS, TYPES, text_role
from qcompiler.engine import Array, Feeds, TensorInfo

TRIPS = 3
"""Number for an input that counts."""
_PATCHES = 4096
_RIDGE = 0.1

Draw = Callable[[np.random.Generator], Array]


@dataclass(frozen=True)
class Maker:
    """How one input is invented: draws, and the words for it."""

    info: TensorInfo
    draw: Draw
    text: str


def synthetic_feeds(model: ir.Model, inputs: Sequence[TensorInfo], count: int, seed: int = 0) -> FeedSource:
    """Invent feeds by what the graph tells about its inputs; ``synthetic`` of the result says how.

    - Image-like floats are smooth random pictures with the 1/f amplitude spectrum of natural ones (Field, "Relations
      between the statistics of natural images and the response properties of cortical cells", 1987), channels
      correlated, brightness and contrast varied, saturated at both ends; signals likewise along their last axis.
    - Where a BatchNormalization lies behind the first Conv, Gemm or MatMul, one standard deviation for all channels and
      a mean per channel are fitted so that its input has the mean and variance it expects (geometric mean of the
      variances' ratios; least squares with a ridge for the means). Canonicalization folds these away: give the model as
      imported. Behind a QuantizeLinear, its range is filled instead. Else mean 0 and standard deviation 1 are assumed.
    - Integers that look up a table are drawn from its rows; masks are ones, types zeros, positions count, what the
      graph compares with constants takes those; other integers are 0 or 1. Booleans are mixed.
    - Open axes: batch 1, sequence 64, pictures 224x224.

    Args:
        model: the graph as imported.
        inputs: its inputs.
        count: number of feeds.
        seed: other seeds give other feeds.

    Raises:
        CalibrationError: an input's rank is unknown, or it is text.
    """
    values = {value.name: value for value in model.graph.inputs}
    shapes = open_lengths(values, inputs)
    makers = [_maker(info, values.get(info.name), shapes[info.name]) for info in inputs]

    def start() -> Iterator[Feeds]:
        for index in range(count):
            yield {m.info.name: _drawn(m, np.random.default_rng([seed, index, k])) for k, m in enumerate(makers)}

    text = "; ".join(f"{m.info.name}: {m.text}" for m in makers)
    probe = [_drawn(m, np.random.default_rng([seed, 0, k])).tobytes() for k, m in enumerate(makers)]
    digest = hashlib.sha256(b"\0".join([text.encode(), *probe])).hexdigest()[:16]
    return FeedSource(start, inputs, f"synthetic-{digest}-{seed}-{count}", count, synthetic=text)


def _drawn(maker: Maker, generator: np.random.Generator) -> Array:
    drawn, dtype = maker.draw(generator), maker.info.dtype
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        drawn = np.clip(np.rint(drawn), limits.min, limits.max)
    return np.asarray(drawn).astype(dtype)


def _maker(info: TensorInfo, value: ir.Value | None, shape: tuple[int, ...]) -> Maker:
    if text_role(info.name) == MASK or info.name.lower().endswith("_mask"):
        return Maker(info, lambda _: np.ones(shape), "ones, a mask")
    if info.dtype.kind == "b":
        return Maker(info, lambda g: g.random(shape) < 0.5, "true and false")
    if info.dtype.kind in "fV":
        return _floats(info, value, shape)
    table = table_size(value) if value is not None else None
    if info.dtype.itemsize == 1 and table is None and is_pictured(info, shape):
        middle = 128.0 if info.dtype == np.uint8 else 0.0
        return Maker(info, lambda g: middle + unit(g, info, shape) * 127 / EDGE, "smooth random pictures (1/f)")
    return _integers(info, value, shape, table)


def _integers(info: TensorInfo, value: ir.Value | None, shape: tuple[int, ...], table: int | None) -> Maker:
    role = text_role(info.name)
    if role == TYPES:
        return Maker(info, lambda _: np.zeros(shape), "zeros, types of segments")
    if role == POSITIONS:
        counted = np.broadcast_to(np.arange(shape[-1] if shape else 1), shape) % (table or max(1, *shape, 1))
        return Maker(info, lambda _: counted, "positions from 0")
    if table is not None:
        return Maker(info, lambda g: g.integers(0, table, shape), f"random rows of a table of {table}")
    if value is not None and (known := compared_constants(value)):
        listed = ", ".join(f"{number:g}" for number in known)
        return Maker(info, lambda g: g.choice(known, shape), f"one of {listed}, which the graph compares it with")
    wanted = wanted_shape(value) if value is not None else None
    if wanted is not None and shape == (len(wanted),):
        return Maker(info, lambda _: np.asarray(wanted), f"{list(wanted)}, the shape that the graph expects")
    if value is not None and is_size(value):
        number = TRIPS if not shape else 1
        return Maker(info, lambda _: np.full(shape, number), f"{number}, a size or count")
    return Maker(info, lambda g: g.integers(0, 2, shape), "zeros and ones")


def _floats(info: TensorInfo, value: ir.Value | None, shape: tuple[int, ...]) -> Maker:
    smooth = is_pictured(info, shape) or is_signal(shape)
    kind = f"smooth random {'pictures' if is_pictured(info, shape) else 'signals'} (1/f)" if smooth else "normal"
    draw: Draw = lambda g: unit(g, info, shape)  # noqa: E731
    scale = find_scale(value) if value is not None and 0 not in shape else None
    if scale is not None and scale.mean is not None:
        mean, deviation = fit_scale(scale, draw, shape)
        text = f"{kind} that meet the mean and variance of BatchNormalization {scale.name!r}"
        return Maker(info, lambda g: _before(scale, mean, deviation, draw(g)), text)
    bounds = quantized_range(value) if value is not None else None
    if bounds is not None:
        middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
        text = f"{kind} over the range of the QuantizeLinear, {bounds[0]:g} to {bounds[1]:g}"
        return Maker(info, lambda g: middle + draw(g) * half / EDGE, text)
    if scale is not None and not scale.chain.plain and smooth:
        flat = np.zeros(len(scale.chain.axes) and shape[scale.chain.axes[1]])
        text = f"{kind}, normalized behind the constants of the graph"
        return Maker(info, lambda g: _before(scale, flat, flat + 1, draw(g)), text)
    return Maker(info, draw, f"{kind} of mean 0 and standard deviation 1 (nothing tells the scale)")


def _before(scale: Scale, mean: Double, deviation: Double, drawn: Double) -> Double:
    """Return the input for which the operator sees ``mean + deviation * drawn``, both per channel."""
    across = [1] * len(scale.chain.axes)
    across[scale.chain.axes[1]] = -1
    wanted = mean.reshape(across) + deviation.reshape(across) * drawn
    factor = np.where(scale.chain.a == 0, 1, scale.chain.a)
    return np.asarray((wanted - scale.chain.b) / factor, np.float64)


def fit_scale(scale: Scale, draw: Draw, shape: Sequence[int]) -> tuple[Double, Double]:
    """Return (mean, standard deviation) per channel with which unit draws meet a BatchNormalization's statistics.

    Args:
        scale: the operator in front of it, and its statistics.
        draw: draws inputs of mean 0 and standard deviation 1.
        shape: of one draw, in the input's order of axes.
    """
    assert scale.mean is not None
    assert scale.variance is not None
    if scale.weight is None:
        return scale.mean, np.sqrt(scale.variance)
    weight = scale.weight.reshape(len(scale.weight), -1)
    patches = _patches(scale, draw, shape)
    seen = patches @ weight.T
    spread = seen.var(axis=0)
    alive = spread > 1e-12 * max(1e-300, float(spread.max(initial=0)))
    ratio = scale.variance[alive] / spread[alive]
    deviation = math.exp(float(np.log(ratio).mean()) / 2) if alive.any() else 1.0
    channels = scale.weight.shape[1]
    sums = scale.weight.reshape(len(weight), channels, -1).sum(axis=2)
    # Residuals in standard deviations; the ridge settles what filters that add up to zero leave open.
    width = np.sqrt(scale.variance)
    rows = np.concatenate([sums * deviation / width[:, None], math.sqrt(_RIDGE) * np.eye(channels)])
    wanted = (scale.mean - scale.bias - deviation * seen.mean(axis=0)) / width
    solved = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros(channels)]), rcond=None)[0]
    return solved * deviation, np.full(channels, deviation)


def _patches(scale: Scale, draw: Draw, shape: Sequence[int]) -> Double:
    """Return what a kernel sees of unit draws: float64 [patches, channels * kernel]."""
    assert scale.weight is not None
    generator = np.random.default_rng(0)
    kernel = scale.weight.shape[2:]
    span = [(k - 1) * d + 1 for k, d in zip(kernel, scale.dilations, strict=True)]
    found: list[Double] = []
    # Brightness and contrast differ from draw to draw: many draws, few patches of each.
    draws = min(64, max(8, 2**24 // max(1, math.prod(shape)))) if kernel else max(1, _PATCHES // max(1, shape[0]))
    for _ in range(draws):
        seen = draw(generator).transpose(scale.chain.axes)
        if not kernel:
            found.append(seen)
            continue
        short = [max(0, s - n) for s, n in zip(span, seen.shape[2:], strict=True)]
        seen = np.pad(seen, [(0, 0), (0, 0), *((0, s) for s in short)])
        windows = np.lib.stride_tricks.sliding_window_view(seen, span, axis=tuple(range(2, seen.ndim)))
        thinned: Any = (..., *(slice(None, None, step) for step in scale.dilations))
        windows = windows[thinned]
        sides, count = (windows.shape[0], *windows.shape[2 : seen.ndim]), max(1, _PATCHES // draws)
        first, *others = (generator.integers(0, side, count) for side in sides)
        places: Any = (first, slice(None), *others)
        found.append(windows[places].reshape(count, -1))
    return np.concatenate(found)


def random_feeds(inputs: Sequence[TensorInfo], count: int, seed: int = 0) -> list[Feeds]:
    """Make random feeds: standard normal floats, small non-negative integers, mixed booleans; open axes have length 1.

    Raises:
        CalibrationError: an input's rank is unknown, or its type is text.
    """
    generator = np.random.default_rng(seed)
    feeds: list[Feeds] = []
    for _ in range(count):
        feed: dict[str, Array] = {}
        for info in inputs:
            check_inventable(info)
            shape = [d if isinstance(d, int) and d >= 0 else 1 for d in info.shape or ()]
            drawn: Array
            if info.dtype.kind in "fV":
                drawn = generator.standard_normal(shape)
            elif info.dtype.kind == "b":
                drawn = generator.random(shape) < 0.5
            else:
                drawn = generator.integers(0, 2, shape)
            feed[info.name] = np.asarray(drawn).astype(info.dtype)
        feeds.append(feed)
    return feeds

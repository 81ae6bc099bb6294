"""Smooth random pictures and signals: the 1/f amplitude spectrum of natural ones, saturated at both ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.image_options import image_layout
from qcompiler.engine import TensorInfo

Double = npt.NDArray[np.float64]
EDGE = 2.5
"""Where pictures saturate, in standard deviations: pixels normalized as for ImageNet end at -2.1 and 2.6."""
_SHARED = 0.9
"""Share of the variance that the channels of a picture have in common."""


def is_pictured(info: TensorInfo, shape: Sequence[int]) -> bool:
    """Return whether an input of that shape takes pictures of at least 8x8."""
    layout = image_layout(info)
    return layout is not None and min(shape[layout.index(axis)] for axis in "HW") >= 8


def is_signal(shape: Sequence[int]) -> bool:
    """Return whether the last axis is a signal: 256 samples or more, in up to 8 channels."""
    return len(shape) in (2, 3) and shape[-1] >= 256 and (len(shape) == 2 or shape[1] <= 8)


def unit(generator: np.random.Generator, info: TensorInfo, shape: Sequence[int]) -> Double:
    """Draw a picture, a signal or independent numbers, by the shape; mean 0 and standard deviation about 1."""
    if 0 in shape:
        return np.zeros(shape)
    if is_pictured(info, shape):
        layout = image_layout(info) or ""
        lengths = dict(zip(layout, shape, strict=True))
        made = [_picture(generator, lengths["C"], (lengths["H"], lengths["W"])) for _ in range(lengths["N"])]
        return np.stack(made).transpose(["NCHW".index(axis) for axis in layout])
    if is_signal(shape):
        rows = [_saturated(generator, _pink(generator, (shape[-1],))) for _ in range(math.prod(shape[:-1]))]
        return np.stack(rows).reshape(shape)
    return generator.standard_normal(shape)


def _picture(generator: np.random.Generator, channels: int, size: tuple[int, int]) -> Double:
    common = _pink(generator, size)
    own = np.stack([_pink(generator, size) for _ in range(channels)])
    mixed = common if channels == 1 else math.sqrt(_SHARED) * common + math.sqrt(1 - _SHARED) * own
    return _saturated(generator, np.broadcast_to(mixed, (channels, *size)))


def _saturated(generator: np.random.Generator, pattern: Double) -> Double:
    """Vary brightness (a quarter of the variance) and contrast (half to one and a half), and saturate."""
    contrast = generator.uniform(0.5, 1.5) / math.sqrt(13 / 12)
    return np.clip(0.5 * generator.standard_normal() + math.sqrt(0.75) * contrast * pattern, -EDGE, EDGE)


def _pink(generator: np.random.Generator, size: Sequence[int]) -> Double:
    """Return noise of amplitude 1 / frequency, mean 0 and standard deviation 1 (a single sample is 0)."""
    # The last axis of a real transform holds its non-negative frequencies only.
    steps = (*(np.fft.fftfreq(n) for n in size[:-1]), np.fft.rfftfreq(size[-1]))
    squares = [np.square(grid) for grid in np.meshgrid(*steps, indexing="ij")]
    frequency = np.sqrt(np.sum(squares, axis=0))
    amplitude = np.divide(1.0, frequency, out=np.zeros_like(frequency), where=frequency > 0)
    pattern = np.fft.irfftn(
        np.fft.rfftn(generator.standard_normal(tuple(size))) * amplitude, tuple(size), axes=range(len(size))
    )
    deviation = float(pattern.std())
    return np.asarray(pattern / deviation if deviation > 0 else pattern, np.float64)

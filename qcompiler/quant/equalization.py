"""Scales per channel between layers, by the error that is expected of activations and weights together.

Nagel et al. 2019, Data-Free Quantization Through Weight Equalization and Bias Correction (arXiv:1906.04721),
section 4.1: behind f(s x) = s f(x), W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1). There S makes the ranges of the
weights alike, for weights with one scale per tensor. Weights per output channel gain nothing of that: what W1's rows
are divided by, their scales are too. What gains is the activation between, whose channels share one scale: they are
brought to like reach, as far as the columns of W2, which get the spread instead, are not hurt more (SmoothQuant's
trade, arXiv:2211.10438). Errors are counted in the numbers of the unscaled graph, so that classes do not depend on each
other: what the original iterates over pairs of layers until it converges is done here in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

ALPHAS = (0.25, 0.5, 0.75, 1.0)
STRENGTHS = (0.5, 1.0)
SPREAD = 2.0**12
"""By how much two scales of one class may differ at most."""


@dataclass(frozen=True, eq=False)
class Activation:
    """One quantized value of a class.

    Attributes:
        ids: number of each channel within the class, -1 where it cannot be scaled.
        low: smallest value per channel.
        high: largest value per channel.
    """

    ids: Ids
    low: Float
    high: Float


@dataclass(frozen=True, eq=False)
class Reader:
    """One product that reads channels of a class.

    Attributes:
        ids: number of each channel, [groups, channels of a group].
        largest: largest |w| over the taps, [groups, outputs of a group, channels of a group].
        power: sum of w^2 over the taps and outputs, [groups, channels of a group].
        taps: weights per input and output channel.
        mean_square: E[x^2] of each channel, [groups, channels of a group].
    """

    ids: Ids
    largest: Float
    power: Float
    taps: int
    mean_square: Float

    @property
    def signal(self) -> float:
        """Return the expected power of its outputs."""
        return max(float((self.power * self.mean_square).sum()), 1e-30)


def expected_error(
    activations: Sequence[Activation], readers: Sequence[Reader], scale: Float, steps: tuple[int, int] = (255, 127)
) -> float:
    """Return the expected error of all readers, each relative to its own signal.

    Args:
        activations: values with one scale each.
        readers: products with weight scales per output channel.
        scale: s per channel of the class.
        steps: quantization steps of an activation's range and of a weight's reach.
    """
    s = np.append(scale, 1.0)  # number -1: a channel that is not scaled
    weight_of_channel = np.zeros(len(s))
    total = 0.0
    for reader in readers:
        np.add.at(weight_of_channel, reader.ids, reader.power / reader.signal)
        column = (reader.largest * s[reader.ids][:, None, :]).max(axis=2) / steps[1]
        behind = reader.taps * (reader.mean_square / s[reader.ids] ** 2).sum(axis=1)
        total += float((np.square(column).sum(axis=1) * behind).sum()) / 12.0 / reader.signal
    for value in activations:
        by = s[value.ids]
        step = (max(float((value.high / by).max()), 0.0) - min(float((value.low / by).min()), 0.0)) / steps[0]
        total += step**2 / 12.0 * float((by**2 * weight_of_channel[value.ids]).sum())
    return total


def class_scale(
    activations: Sequence[Activation], readers: Sequence[Reader], size: int, alpha: float, strength: float
) -> Float:
    """Return s per channel, with geometric mean 1.

    Args:
        activations: values of the class.
        readers: products that read it.
        size: channels of the class.
        alpha: share of the spread that the weights take.
        strength: power to which all scales are raised; 0 changes nothing.
    """
    reach, columns = np.zeros(size + 1), np.zeros(size + 1)
    for value in activations:
        found = np.maximum(np.abs(value.low), np.abs(value.high))
        np.maximum.at(reach, value.ids, found / max(float(found.max(initial=0.0)), 1e-30))
    for reader in readers:
        if reader.ids.shape[1] > 1:  # a depthwise weight takes any spread: it has a scale per channel
            by_input = reader.largest.max(axis=1)
            np.maximum.at(columns, reader.ids, by_input / max(float(by_input.max()), 1e-30))
    logs = alpha * np.log(np.maximum(reach[:size], 1e-5))
    if columns.any():
        logs -= (1.0 - alpha) * np.log(np.maximum(columns[:size], 1e-5))
    logs = strength * (logs - logs.mean())
    half = 0.5 * np.log(SPREAD)
    return np.asarray(np.exp(np.clip(logs, -half, half)))


def best_scale(
    activations: Sequence[Activation], readers: Sequence[Reader], size: int, steps: tuple[int, int] = (255, 127)
) -> tuple[tuple[float, float], float]:
    """Return ((alpha, strength), by what factor the expected error falls) of the best scale."""
    plain = expected_error(activations, readers, np.ones(size), steps)
    errors = {
        (alpha, strength): expected_error(
            activations, readers, class_scale(activations, readers, size, alpha, strength), steps
        )
        for alpha in ALPHAS
        for strength in STRENGTHS
    }
    best = min(errors, key=lambda key: errors[key])
    return best, plain / errors[best] if errors[best] > 0 else 1.0

"""SmoothQuant: move the spread between channels from an activation into the weights that read it.

Xiao et al. 2023, SmoothQuant (arXiv:2211.10438): x W = (x / s) (s W) with s = max|x|^alpha / max|w|^(1 - alpha) per
input channel. Here alpha is chosen per activation by the expected error of the product, weights and activation
together, instead of one alpha for a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def smoothing_scale(reach: Float, weights: Sequence[npt.NDArray[np.float32]], alpha: float) -> Float:
    """Return s per input channel, with geometric mean 1.

    Args:
        reach: largest |x| per channel, [K].
        weights: matrices [K, N] that read the activation.
        alpha: share of the spread that moves into the weights.
    """
    columns = np.max([np.abs(w).max(axis=1) for w in weights], axis=0).astype(np.float64)
    x = np.maximum(reach, 1e-5 * max(float(reach.max(initial=0.0)), 1e-30))
    w = np.maximum(columns, 1e-5 * max(float(columns.max(initial=0.0)), 1e-30))
    logs = alpha * np.log(x) - (1.0 - alpha) * np.log(w)
    return np.asarray(np.exp(logs - logs.mean()))


def expected_error(
    low: Float, high: Float, mean_square: Float, weights: Sequence[npt.NDArray[np.float32]], scale: Float
) -> float:
    """Return the expected squared error of the products per row, for 8-bit x per tensor and 8-bit w per column.

    Rounding errors are taken as uniform and independent: step^2 / 12 per element, x's weighted by the squared weights
    that read it, w's by E[x^2].

    Args:
        low: smallest x per channel, [K].
        high: largest x per channel.
        mean_square: E[x^2] per channel.
        weights: matrices [K, N].
        scale: s per channel.
    """
    step = (max(float((high / scale).max()), 0.0) - min(float((low / scale).min()), 0.0)) / 255.0
    total = 0.0
    for weight in weights:
        smoothed = weight.astype(np.float64) * scale[:, None]
        columns = np.abs(smoothed).max(axis=0) / 127.0
        total += step**2 / 12.0 * float(np.square(smoothed).sum())
        total += float((mean_square / scale**2).sum()) * float(np.square(columns).sum()) / 12.0
    return total


def best_alpha(
    low: Float, high: Float, mean_square: Float, weights: Sequence[npt.NDArray[np.float32]]
) -> tuple[float, float]:
    """Return (alpha, by what factor the expected error falls) of the best alpha."""
    reach = np.maximum(np.abs(low), np.abs(high))
    plain = expected_error(low, high, mean_square, weights, np.ones_like(reach))
    errors = {
        alpha: expected_error(low, high, mean_square, weights, smoothing_scale(reach, weights, alpha))
        for alpha in ALPHAS
    }
    alpha = min(errors, key=lambda a: errors[a])
    return alpha, plain / errors[alpha] if errors[alpha] > 0 else 1.0

"""Functions that may stand between a quantized value and what matters of it; errors then count behind them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

from qcompiler.calibration.histogram import Floats, Histogram
from qcompiler.errors import CalibrationError

Function = Callable[[Floats], Floats]

_UNDERFLOW = 104.0
"""exp(-x) of this is zero in float32."""
_CLIP = re.compile(r"clip\((?P<low>[^,()]+),(?P<high>[^,()]+)\)")


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -700.0, 700.0))))


def _gelu(x: Floats) -> Floats:
    """Return GELU in its tanh form, Hendrycks and Gimpel 2016, arXiv:1606.08415 (within 5e-4 of the exact one)."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * np.square(np.clip(x, -1e3, 1e3)))
    return np.asarray(0.5 * x * (1.0 + np.tanh(inner)))


def _identity(x: Floats) -> Floats:
    return x


THROUGH: Mapping[str, Function] = {
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": _gelu,
    "tanh": np.tanh,
    "hard-sigmoid": lambda x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "hard-swish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
}
"""Functions of one value by name; ``softmax`` and ``clip(LOW,HIGH)`` are known besides."""

NAMES = (*THROUGH, "softmax", "clip(LOW,HIGH)")


def softmax_model(peak: float) -> Function:
    """Return how much a Softmax keeps of one of its inputs, without knowing the rest of its row.

    A score's probability is at most exp(score - largest score of its row), and so is the derivative of any probability
    by it: an error in a score ten below the row's largest is worth e^-10 of one in the largest. Scores above ``peak``
    count in full, those below with that weight: x for x >= peak, peak + exp(x - peak) - 1 below it.

    Args:
        peak: a largest score that no row is assumed to fall below.
    """

    def function(x: Floats) -> Floats:
        return np.where(x >= peak, x, peak + np.expm1(np.minimum(x - peak, 0.0)))

    return function


def function_of(name: str, tensor: Histogram) -> Function:
    """Return the function that a name such as ``relu``, ``softmax`` or ``clip(-1,6)`` stands for; empty is identity.

    For ``softmax`` the median of the scores stands for the lowest of the rows' largest ones (`softmax_model`): rows are
    not told apart in a histogram, and hardly any row has its largest score in the lower half of all. Masked scores,
    which float32 cannot tell from impossible beside the largest score, do not count.

    Raises:
        CalibrationError: unknown function.
    """
    if not name:
        return _identity
    if name == "softmax":
        return softmax_model(_middle_score(tensor))
    if (found := _CLIP.fullmatch(name)) is not None:
        low, high = _bound(found["low"], name), _bound(found["high"], name)
        return lambda x: np.clip(x, low, high)
    if name in THROUGH:
        return THROUGH[name]
    raise CalibrationError(f"unknown function {name!r} to look through; known: {', '.join(NAMES)}")


def _middle_score(tensor: Histogram) -> float:
    """Return the median of the scores that are not masked."""
    half = tensor.counts.size // 2
    first = half + math.floor((tensor.maximum - _UNDERFLOW) / tensor.width)
    counts = tensor.counts[max(first, 0) :]
    middle = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2))
    return (max(first, 0) + middle + 0.5 - half) * tensor.width


def _bound(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise CalibrationError(
            f"{name!r}: {text!r} is not a number; write clip(LOW,HIGH), -inf and inf for none"
        ) from None

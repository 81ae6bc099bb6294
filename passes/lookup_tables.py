"""Unary functions of quantized numbers as tables of 256 entries, computed in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import erf, expit

Double = npt.NDArray[np.float64]
Unary = Callable[[Double, Mapping[str, Any]], Double]


def all_reals(scale: np.float32, zero: int) -> Double:
    """Return the real numbers that all int8 stand for, from -128 up."""
    return np.asarray((np.arange(-128, 128) - zero) * np.float64(scale), np.float64)


def _plain(function: Callable[[Double], Double]) -> Unary:
    return lambda x, attributes: np.asarray(function(x), np.float64)


def _single(attributes: Mapping[str, Any], name: str, default: float) -> float:
    return float(np.float32(attributes.get(name, default)))


def _gelu(x: Double, attributes: Mapping[str, Any]) -> Double:
    if attributes.get("approximate", "none") == "tanh":
        return np.asarray(x * expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)), np.float64)
    return np.asarray(0.5 * x * (1 + erf(x / np.sqrt(2))), np.float64)


def _leaky(x: Double, attributes: Mapping[str, Any]) -> Double:
    return np.where(x >= 0, x, x * _single(attributes, "alpha", 0.01))


def _elu(x: Double, attributes: Mapping[str, Any]) -> Double:
    return np.where(x >= 0, x, _single(attributes, "alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _selu(x: Double, attributes: Mapping[str, Any]) -> Double:
    alpha, gamma = (
        _single(attributes, "alpha", 1.67326319217681884765625),
        _single(attributes, "gamma", 1.05070102214813232421875),
    )
    return gamma * np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _hard_sigmoid(x: Double, attributes: Mapping[str, Any]) -> Double:
    return np.clip(_single(attributes, "alpha", 0.2) * x + _single(attributes, "beta", 0.5), 0, 1)


FUNCTIONS: Mapping[str, Unary] = {
    "Sigmoid": _plain(expit),
    "Tanh": _plain(np.tanh),
    "Exp": _plain(lambda x: np.exp(np.minimum(x, 700.0))),
    "Erf": _plain(erf),
    "Softplus": _plain(lambda x: np.logaddexp(x, 0.0)),
    "Softsign": _plain(lambda x: x / (1 + np.abs(x))),
    "HardSwish": _plain(lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky,
    "Elu": _elu,
    "Selu": _selu,
    "Gelu": _gelu,
    "Swish": lambda x, attributes: x * expit(_single(attributes, "alpha", 1.0) * x),
}
"""What each operator computes of real numbers and its attributes."""

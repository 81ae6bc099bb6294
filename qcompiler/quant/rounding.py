"""Choose to which of its two neighbours on the grid each weight is rounded, by the error of the layer's output.

Rounding to nearest makes each weight's own error least, not the product's: errors of weights that read correlated
inputs add up or cancel. With H = E[x x'] of the inputs, the squared error of a column's product is d' H d, where d is
the column's rounding error. Two ways to make it small:

- `round_sequentially`: round one row of the matrix after the other and spread each error over the rows that are still
  free (Frantar et al. 2022, GPTQ, arXiv:2210.17323, after Frantar and Alistarh 2022, OBQ, arXiv:2208.11580). One pass.
- `round_softly`: let each weight's fraction be free between its two neighbours, descend d' H d and press the fractions
  to 0 or 1 (Nagel et al. 2020, AdaRound, arXiv:2004.10568, equations 21 to 25), with H in place of sampled rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.quant.spec import QuantParams

Float = npt.NDArray[np.float64]
Real = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.int64]

DAMP = 0.01
"""Share of H's mean diagonal that is added to its diagonal, as GPTQ does."""
_BLOCK = 64
_STRETCH = (-0.1, 1.1)
"""AdaRound's zeta and gamma: the sigmoid is stretched so that it reaches 0 and 1."""
_WARM = 0.2
_BETA = (20.0, 2.0)


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight with the integers it was rounded to.

    Attributes:
        params: scale and zero point that the integers count in.
        codes: stored integers, of the weight's shape.
    """

    params: QuantParams
    codes: npt.NDArray[np.integer[Any]]


def output_error(error: Real, hessian: Real) -> Real:
    """Return the mean squared error of each column's product: d' H d.

    Args:
        error: weight errors [..., K, N].
        hessian: E[x x'] [..., K, K].

    Returns:
        Float [..., N].
    """
    return np.asarray(np.einsum("...kn,...kn->...n", error, hessian @ error))


def round_nearest(weight: Real, scale: Real, zero: Real, limits: tuple[int, int]) -> Int:
    """Return the nearest codes of matrices [..., K, N] under scales that broadcast to them."""
    return np.clip(np.rint(weight / scale) + zero, *limits).astype(np.int64)


def round_sequentially(weight: Real, scale: Real, zero: Real, limits: tuple[int, int], hessian: Real) -> Int:
    """Return the codes that GPTQ finds, row by row in the order of falling H diagonal.

    Row k is rounded after the errors d of the rows in front of it were made up for: w_k + sum of d_j F_jk with H =
    (F + I) D (F + I)', F strictly upper triangular. That is GPTQ's update without its inverse of H (Chee et al. 2023,
    QuIP, arXiv:2307.13304, where it is called LDLQ). Matrices are rounded side by side.

    Args:
        weight: [..., K, N], float32 or float64; row k is multiplied by input k.
        scale: broadcasts to the weight.
        zero: zero points, of the scale's shape.
        limits: least and largest code.
        hessian: E[x x'] [..., K, K], one per matrix.

    Returns:
        int64 [..., K, N]. A column whose error is not less than that of rounding to nearest keeps the nearest codes.
    """
    order = np.argsort(-np.diagonal(hessian, axis1=-2, axis2=-1), axis=-1, kind="stable")
    feedback = _feedback(hessian, order).astype(weight.dtype)
    kept = order[..., None]
    wanted, steps, moved = (
        np.take_along_axis(np.broadcast_to(a, weight.shape), kept, -2) for a in (weight, scale, zero)
    )
    codes = np.empty_like(wanted)
    errors = np.zeros_like(wanted)
    for start in range(0, weight.shape[-2], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[-2])
        left = wanted[..., start:stop, :].copy()
        left += np.swapaxes(feedback[..., :start, start:stop], -1, -2) @ errors[..., :start, :]
        for row in range(start, stop):
            step, shift = steps[..., row, :], moved[..., row, :]
            codes[..., row, :] = np.clip(np.rint(left[..., row - start, :] / step) + shift, *limits)
            errors[..., row, :] = wanted[..., row, :] - (codes[..., row, :] - shift) * step
            spread = feedback[..., row, row + 1 : stop, None] * errors[..., row, None, :]
            left[..., row + 1 - start :, :] += spread
    found = np.empty(weight.shape, np.int64)
    np.put_along_axis(found, np.broadcast_to(kept, weight.shape), codes.astype(np.int64), -2)
    return _better(weight, scale, zero, limits, hessian, found)


def _feedback(hessian: Real, order: Int) -> Real:
    """Return F + I [..., K, K] of the damped H whose rows and columns were put in order."""
    backwards = order[..., ::-1]
    damped = np.take_along_axis(np.take_along_axis(hessian, backwards[..., :, None], -2), backwards[..., None, :], -1)
    diagonal = np.einsum("...kk->...k", damped)
    mean = diagonal.mean(axis=-1, keepdims=True)
    diagonal += np.where(mean > 0, DAMP * mean, 1.0)
    try:
        lower = np.linalg.cholesky(damped)
    except np.linalg.LinAlgError:  # of float32 numbers, by their rounding
        lower = np.linalg.cholesky(damped.astype(np.float64))
    upper = lower[..., ::-1, ::-1]
    return np.asarray(upper / np.diagonal(upper, axis1=-2, axis2=-1)[..., None, :])


def round_softly(
    weight: Real, scale: Real, zero: Real, limits: tuple[int, int], hessian: Real, steps: int = 300
) -> Int:
    """Return the codes that AdaRound finds: minimise d' H d + lambda sum(1 - |2 h(v) - 1|^beta) over v by Adam.

    Args:
        weight: [..., K, N].
        scale: broadcasts to the weight.
        zero: zero points, of the scale's shape.
        limits: least and largest code.
        hessian: E[x x'] [..., K, K], one per matrix.
        steps: of gradient descent; the regularizer enters after a fifth of them.

    Returns:
        int64 [..., K, N]; as `round_sequentially` for columns that do not gain.
    """
    low, high = _STRETCH
    base = np.floor(weight / scale)
    fraction = weight / scale - base
    v = -np.log((high - low) / (np.clip(fraction, 1e-4, 1 - 1e-4) - low) - 1.0)
    # Per column the error counts relative to that of rounding to nearest, so that one step size fits all layers.
    nearest = round_nearest(weight, scale, zero, limits)
    unit = np.maximum(output_error((nearest - zero) * scale - weight, hessian), 1e-30)[..., None, :]
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step in range(steps):
        sigmoid = 1.0 / (1.0 + np.exp(-v))
        soft = np.clip(sigmoid * (high - low) + low, 0.0, 1.0)
        inside = ((soft > 0) & (soft < 1)) * sigmoid * (1 - sigmoid) * (high - low)
        gradient = 2.0 * (hessian @ ((base + soft) * scale - weight)) * scale / unit
        if step >= _WARM * steps:
            share = (step / steps - _WARM) / (1 - _WARM)
            beta = _BETA[1] + (_BETA[0] - _BETA[1]) * 0.5 * (1 + np.cos(share * np.pi))
            from_middle = 2.0 * soft - 1.0
            gradient -= 1.0 / v.shape[-2] * 2.0 * beta * np.sign(from_middle) * np.abs(from_middle) ** (beta - 1)
        gradient *= inside
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = 0.05 / (1 - 0.9 ** (step + 1)) * np.sqrt(1 - 0.999 ** (step + 1))
        v -= rate * first / (np.sqrt(second) + 1e-12)
    soft = np.clip((high - low) / (1.0 + np.exp(-v)) + low, 0.0, 1.0)
    found = np.clip(base + (soft >= 0.5) + zero, *limits).astype(np.int64)
    return _better(weight, scale, zero, limits, hessian, found)


def _better(weight: Real, scale: Real, zero: Real, limits: tuple[int, int], hessian: Real, found: Int) -> Int:
    """Keep the found codes of the columns whose products they bring closer, and the nearest ones of the others."""
    nearest = round_nearest(weight, scale, zero, limits)
    before, after = (
        output_error(((codes - zero) * scale - weight).astype(weight.dtype), hessian) for codes in (nearest, found)
    )
    return np.where((after < before)[..., None, :], found, nearest)

"""``decode_attention`` in NumPy, in float64, and how a cache of 4 bits is packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.engine import Array
from qcompiler.kernels.contract import Options
from qcompiler.kernels.decode_attention.contract import softmax_factor
from qcompiler.kernels.epilogue.reference import store

Double = npt.NDArray[np.float64]


def reference(given: Mapping[str, Any], options: Options) -> dict[str, Array]:
    """Compute the kernel's outputs.

    Args:
        given: arguments by name, checked against the contract.
        options: complete.

    Returns:
        ``out`` of shape [B, H, D].
    """
    p, v = probabilities(given, options), dequantized(given, options, "v")
    out = np.einsum("bhs,bhsd->bhd", p, np.repeat(v, p.shape[1] // v.shape[1], axis=1))
    return {"out": store(np.asarray(out, np.float32), options["out"], 0)}


def probabilities(given: Mapping[str, Any], options: Options) -> Double:
    """Return the softmax of the scores, [B, H, S]; zeros from the length of a sequence on."""
    q, k = given["q"].astype(np.float64), dequantized(given, options, "k")
    scores = np.einsum("bhd,bhsd->bhs", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1))
    scores = scores * softmax_factor(given, options, q.shape[2])
    known = np.arange(k.shape[2]) < given["lengths"][:, None, None]
    greatest = np.max(scores, -1, keepdims=True, where=known, initial=-np.inf)
    weights = np.exp(np.where(known, scores - greatest, -np.inf))
    return np.asarray(weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(np.float64).tiny), np.float64)


def dequantized(given: Mapping[str, Any], options: Options, letter: str) -> Double:
    """Return the keys (``k``) or values (``v``), [B, G, S, D]."""
    packed = options["cache"] == "uint4"
    stored = unpack(given[letter + "4"]).astype(np.float64) - 8 if packed else given[letter].astype(np.float64)
    match options[f"{letter}_scale"]:
        case "tensor":
            scale = given[f"{letter}_scale_one"]
        case "channel":
            scale = given[f"{letter}_scale_channel"][None, :, None, :]
        case _:
            scale = given[f"{letter}_scale_token"][..., None]
    return np.asarray(stored * scale, np.float64)


def pack(numbers: Array) -> npt.NDArray[np.uint8]:
    """Pack unsigned numbers of 4 bits [..., D] to bytes [..., D/2]: byte j holds the numbers j (low) and D/2 + j."""
    stored = numbers.astype(np.uint8)
    half = stored.shape[-1] // 2
    return np.ascontiguousarray(stored[..., :half] | stored[..., half:] << 4)


def unpack(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the numbers [..., D] of packed bytes [..., D/2]."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)

"""The threshold with the least Kullback-Leibler divergence: TensorRT's entropy calibration."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qcompiler.calibration.histogram import Floats, Points


def least_divergence(points: Points, levels: int = 128) -> float:
    """Find the threshold whose quantized distribution of |x| is closest to the clipped one.

    Szymon Migacz, "8-bit Inference with TensorRT", GTC 2017. For each candidate of i bins the reference P is the first
    i bins of the histogram of |x|, everything beyond them added to the last; Q merges those bins (without what is
    beyond) into ``levels`` groups and spreads the sum of each evenly over its bins that are not empty. The candidate
    with the least KL(P || Q) wins, the widest of equals. Group g starts at the bin ceil(g * i / levels), as in NVIDIA's
    pytorch-quantization. Elements equal to zero are left out of the histogram, as that one drops its first bin: zero
    is exact at any threshold, but its peak (half of the elements behind a Relu) would be spread over its group and
    pull the threshold down.

    With P = c / N for the bins' counts c, and Q_k = C_g / (nonzero_g S) in group g, where S is the sum within i bins,

        KL = sum_k P_k log P_k - sum_g (C_g / N) log(C_g / (nonzero_g S)) - (beyond / N) log Q_last

    whose sums are differences of cumulative ones: 2048 candidates cost a table of candidates times levels, no loop.

    Args:
        points: the values.
        levels: groups; half the format's levels, since |x| stands for one side.

    Returns:
        The threshold, at most the largest |x|.
    """
    largest = max(-points.minimum, points.maximum)
    counts = np.zeros(max(points.below.size, points.above.size))
    counts[: points.below.size] += points.below_weights
    counts[: points.above.size] += points.above_weights
    if counts.size <= levels:
        return largest
    candidates = np.arange(levels, counts.size + 1, dtype=np.int64)
    divergences = _divergences(counts, candidates, levels)
    # The widest of equals.
    best = int(candidates[divergences.size - 1 - int(np.argmin(divergences[::-1]))])
    return min(best * points.width, largest)


def _divergences(counts: Floats, candidates: npt.NDArray[np.int64], levels: int) -> Floats:
    """Return KL(P || Q) times the number of elements, less what is the same for all, per candidate number of bins.

    It is infinite where the last bin is empty but something lies beyond: P is positive there and Q is zero.
    """
    i = candidates
    sums = np.concatenate([[0.0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    total, within = sums[-1], sums[i]
    beyond, last = total - within, counts[i - 1]
    borders = -(-(np.arange(levels + 1)[None, :] * i[:, None]) // levels)
    groups, used = np.diff(sums[borders], axis=1), np.diff(filled[borders], axis=1)
    reference = entropy[i - 1] + _x_log_x(last + beyond)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(groups > 0, np.log(groups / used), 0.0)
        cross = np.einsum("ig,ig->i", groups, logs) + beyond * logs[:, -1] - total * np.log(within)
    divergence = reference - cross
    return np.where((beyond > 0) & (last == 0), np.inf, divergence)


def _x_log_x(x: Floats) -> Floats:
    return np.asarray(x * np.log(np.where(x > 0, x, 1.0)))

"""Sliding windows of convolutions and pools: resolved geometry, and the view that an array gives of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import ModelError


@dataclass(frozen=True)
class Window:
    """A window over the spatial axes of [B, C, *spatial], one entry per spatial axis.

    Attributes:
        kernel: lengths.
        strides: steps between windows.
        dilations: steps between the elements of one window.
        begin: padding in front.
        end: padding behind.
        extra: room behind the padding that ceil_mode needs; it is no padding and counts nowhere.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    extra: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Return the number of spatial axes."""
        return len(self.kernel)


def resolve_window(
    kernel: Sequence[int],
    spatial: Sequence[int],
    *,
    strides: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    ceil_mode: bool = False,
) -> Window:
    """Resolve the attributes of ONNX Conv and pooling operators against an input's spatial shape.

    Args:
        kernel: lengths of the window.
        spatial: the input's spatial shape.
        strides: 1 everywhere if None.
        dilations: 1 everywhere if None.
        pads: all beginnings, then all ends; 0 everywhere if None.
        auto_pad: NOTSET, VALID, SAME_UPPER or SAME_LOWER; the last three replace ``pads``.
        ceil_mode: round the number of windows up; a window that starts in the padding behind is left out.

    Raises:
        ModelError: lengths differ, auto_pad is unknown, or the window does not fit in the padded input.
    """
    rank = len(kernel)
    steps = tuple(strides) if strides else (1,) * rank
    holes = tuple(dilations) if dilations else (1,) * rank
    given = tuple(pads) if pads else (0,) * (2 * rank)
    if not (len(spatial) == len(steps) == len(holes) == rank and len(given) == 2 * rank):
        raise ModelError(f"a window of rank {rank} has {len(steps)} strides, {len(holes)} dilations, {len(given)} pads")
    begin, end, extra = [], [], []
    for axis in range(rank):
        reach = (kernel[axis] - 1) * holes[axis] + 1
        first, last = _padding(auto_pad, spatial[axis], reach, steps[axis], (given[axis], given[rank + axis]))
        room = spatial[axis] + first + last - reach
        if room < 0:
            raise ModelError(f"a window that reaches over {reach} elements does not fit in {spatial[axis]}")
        more = -room % steps[axis] if ceil_mode else 0
        if more and room + more >= spatial[axis] + first:
            more = 0
        begin.append(first)
        end.append(last)
        extra.append(more)
    return Window(tuple(kernel), steps, holes, tuple(begin), tuple(end), tuple(extra))


def _padding(auto_pad: str, size: int, reach: int, step: int, given: tuple[int, int]) -> tuple[int, int]:
    if auto_pad in ("NOTSET", ""):
        return given
    if auto_pad == "VALID":
        return 0, 0
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise ModelError(f"unknown auto_pad {auto_pad!r}; expected NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    total = max((-(-size // step) - 1) * step + reach - size, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def windows(x: npt.NDArray[np.int64], window: Window, padding: int) -> npt.NDArray[Any]:
    """Return all windows of x.

    Args:
        x: [B, C, *spatial].
        window: resolved against ``spatial``.
        padding: what the padding holds; the room of ceil_mode holds 0.

    Returns:
        [B, C, *output, *kernel], a view of a padded copy.
    """
    rank = window.rank
    padded = np.pad(x, ((0, 0), (0, 0), *zip(window.begin, window.end, strict=True)), constant_values=padding)
    padded = np.pad(padded, ((0, 0), (0, 0), *((0, e) for e in window.extra)))
    reach = tuple((k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    steps = tuple(slice(None, None, s) for s in window.strides)
    holes = tuple(slice(None, None, d) for d in window.dilations)
    return view[(slice(None), slice(None), *steps, *holes)]

"""Operators with a window: convolutions and pools."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nn
from torch import Tensor

from qcompiler.backends.triton.torch_ops.call import Call, Function, one
from qcompiler.quant.window import Window, resolve_window

_CONV = {1: nn.conv1d, 2: nn.conv2d, 3: nn.conv3d}
_TRANSPOSED = {1: nn.conv_transpose1d, 2: nn.conv_transpose2d, 3: nn.conv_transpose3d}


def window_of(call: Call, kernel: Sequence[int], spatial: Sequence[int]) -> Window:
    """Return the window that an operator's attributes describe, resolved against the data's spatial lengths."""
    return resolve_window(
        kernel, spatial, strides=call.attr("strides"), dilations=call.attr("dilations"), pads=call.attr("pads"),
        auto_pad=call.attr("auto_pad", "NOTSET"), ceil_mode=bool(call.attr("ceil_mode", 0)),
    )  # fmt: skip


def pad_window(x: Tensor, window: Window, value: float) -> Tensor:
    """Pad the spatial axes behind the first two."""
    rank = window.rank
    pads: list[int] = []
    for axis in reversed(range(rank)):
        pads += [window.begin[axis], window.end[axis]]
    return nn.pad(x, pads, value=value) if any(pads) else x


def _conv(call: Call) -> Tensor:
    x, w = call[0], call[1]
    rank = w.dim() - 2
    window = window_of(call, list(w.shape[2:]), list(x.shape[2:]))
    padded = pad_window(x, window, 0.0)
    return _CONV[rank](
        padded, w, call.get(2), list(window.strides), 0, list(window.dilations), int(call.attr("group", 1))
    )


def _conv_transpose(call: Call) -> Tensor:
    x, w = call[0], call[1]
    rank = w.dim() - 2
    strides = list(call.attr("strides") or [1] * rank)
    dilations = list(call.attr("dilations") or [1] * rank)
    extra = list(call.attr("output_padding") or [0] * rank)
    pads = list(call.attr("pads") or [0] * (2 * rank))
    full = [strides[i] * (x.shape[2 + i] - 1) + dilations[i] * (w.shape[2 + i] - 1) + 1 for i in range(rank)]
    auto, wanted = call.attr("auto_pad", "NOTSET"), call.attr("output_shape")
    if wanted is not None or auto in ("SAME_UPPER", "SAME_LOWER"):
        lengths = list(wanted[-rank:]) if wanted is not None else [x.shape[2 + i] * strides[i] for i in range(rank)]
        total = [max(full[i] + extra[i] - lengths[i], 0) for i in range(rank)]
        extra = [max(lengths[i] - full[i], extra[i]) for i in range(rank)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if auto == "SAME_UPPER" else large + small
        if wanted is not None and auto not in ("SAME_UPPER",):
            pads = large + small
    elif auto == "VALID":
        pads = [0] * (2 * rank)
    made = _TRANSPOSED[rank](x, w, None, strides, 0, 0, int(call.attr("group", 1)), dilations)
    for i in range(rank):
        length = full[i] + extra[i] - pads[i] - pads[rank + i]
        if extra[i]:
            grow = [0, 0] * (rank - 1 - i) + [0, extra[i]]
            made = nn.pad(made, grow)
        made = made.narrow(2 + i, pads[i], length)
    bias = call.get(2)
    return made if bias is None else made + bias.reshape([-1] + [1] * rank)


def _patches(x: Tensor, window: Window, value: float, lengths: Sequence[int]) -> Tensor:
    """Return [N, C, *out, *kernel] of padded data; room behind the padding is filled with ``value`` too."""
    rank = window.rank
    x = pad_window(x, window, value)
    short: list[int] = []
    for axis in reversed(range(rank)):
        reach = (lengths[axis] - 1) * window.strides[axis] + window.dilations[axis] * (window.kernel[axis] - 1) + 1
        short += [0, max(reach - x.shape[2 + axis], 0)]
    x = nn.pad(x, short, value=value) if any(short) else x
    shape, strides = list(x.shape[:2]), list(x.stride()[:2])
    for axis in range(rank):
        shape.append(lengths[axis])
        strides.append(x.stride(2 + axis) * window.strides[axis])
    for axis in range(rank):
        shape.append(window.kernel[axis])
        strides.append(x.stride(2 + axis) * window.dilations[axis])
    return x.as_strided(shape, strides, x.storage_offset())


def output_lengths(window: Window, spatial: Sequence[int]) -> list[int]:
    """Return the output's spatial lengths."""
    made = []
    for axis, length in enumerate(spatial):
        reach = window.dilations[axis] * (window.kernel[axis] - 1) + 1
        room = length + window.begin[axis] + window.end[axis] + window.extra[axis] - reach
        made.append(room // window.strides[axis] + 1)
    return made


def max_pool(call: Call) -> tuple[Tensor, ...]:
    """Take the largest number of each window, and its place in the data where that is asked for."""
    x = call[0]
    spatial = list(x.shape[2:])
    window = window_of(call, list(call.attr("kernel_shape")), spatial)
    lengths = output_lengths(window, spatial)
    low = -math.inf if x.is_floating_point() else 0
    kernel_axes = list(range(2 + window.rank, 2 + 2 * window.rank))
    wide = x if x.is_floating_point() else x.to(torch.float32)
    patches = _patches(wide, window, -math.inf, lengths)
    made = patches.amax(dim=kernel_axes)
    if not x.is_floating_point():
        made = made.clamp(min=float(torch.iinfo(x.dtype).min) if low == 0 else None)
    made = made.to(x.dtype)
    if call.outputs < 2:
        return (made,)
    flat = patches.reshape(*patches.shape[: 2 + window.rank], -1)
    chosen = (flat == flat.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)
    return made, _places(chosen, x, window, lengths, int(call.attr("storage_order", 0)))


def _places(chosen: Tensor, x: Tensor, window: Window, lengths: Sequence[int], order: int) -> Tensor:
    """Return the flat index in the data of the chosen element of each window."""
    spatial, rank = list(x.shape[2:]), window.rank
    rest, coordinates = chosen, [chosen] * rank
    for axis in reversed(range(rank)):
        inside = rest % window.kernel[axis]
        rest = rest // window.kernel[axis]
        start = torch.arange(lengths[axis], device=x.device) * window.strides[axis] - window.begin[axis]
        coordinates[axis] = start.reshape([-1] + [1] * (rank - 1 - axis)) + inside * window.dilations[axis]
    index = torch.zeros_like(chosen)
    for axis in range(rank) if order == 0 else reversed(range(rank)):
        index = index * spatial[axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape([*x.shape[:2]] + [1] * rank)
    return planes * math.prod(spatial) + index


def window_sums(x: Tensor, window: Window, lengths: Sequence[int]) -> Tensor:
    """Sum each window; padding counts as zero."""
    axes = list(range(2 + window.rank, 2 + 2 * window.rank))
    return _patches(x, window, 0.0, lengths).sum(dim=axes)


def window_counts(
    window: Window, spatial: Sequence[int], lengths: Sequence[int], with_pads: bool, device: torch.device
) -> Tensor:
    """Return how many elements each window averages, [1, 1, *out]; padding counts where it is asked to."""
    made = torch.ones((1, 1) + (1,) * window.rank, device=device)
    for axis in range(window.rank):
        starts = torch.arange(lengths[axis], device=device) * window.strides[axis] - window.begin[axis]
        steps = torch.arange(window.kernel[axis], device=device) * window.dilations[axis]
        places = starts[:, None] + steps[None]
        low, high = 0, spatial[axis]
        if with_pads:
            low, high = -window.begin[axis], spatial[axis] + window.end[axis]
        count = ((places >= low) & (places < high)).sum(dim=1).to(torch.float32)
        made = made * count.reshape([1, 1] + [-1 if i == axis else 1 for i in range(window.rank)])
    return made.clamp(min=1)


def _average_pool(call: Call) -> Tensor:
    x = call[0]
    spatial = list(x.shape[2:])
    window = window_of(call, list(call.attr("kernel_shape")), spatial)
    lengths = output_lengths(window, spatial)
    counts = window_counts(window, spatial, lengths, bool(call.attr("count_include_pad", 0)), x.device)
    return (window_sums(x, window, lengths) / counts).to(x.dtype)


def _lp_pool(call: Call) -> Tensor:
    x, p = call[0], int(call.attr("p", 2))
    spatial = list(x.shape[2:])
    window = window_of(call, list(call.attr("kernel_shape")), spatial)
    lengths = output_lengths(window, spatial)
    return window_sums(x.abs() ** p, window, lengths) ** (1.0 / p)


def _global(function: str) -> Function:
    def run(call: Call) -> tuple[Tensor, ...]:
        x = call[0]
        axes = list(range(2, x.dim()))
        if function == "max":
            return (x.amax(dim=axes, keepdim=True),)
        if function == "mean":
            return (x.mean(dim=axes, keepdim=True),)
        p = int(call.attr("p", 2))
        return ((x.abs() ** p).sum(dim=axes, keepdim=True) ** (1.0 / p),)

    return run


def _conv_integer(call: Call) -> Tensor:
    x, w = (call[i].to(torch.float64) for i in range(2))
    for index, zero in ((0, call.get(2)), (1, call.get(3))):
        if zero is None:
            continue
        point = zero.to(torch.float64)
        if index == 0:
            x = x - point
        else:
            w = w - (point.reshape([-1] + [1] * (w.dim() - 1)) if point.numel() > 1 else point)
    return _conv(Call("Conv", [x, w], call.attributes)).to(torch.int32)


WINDOWS: Mapping[str, Function] = {
    "Conv": one(_conv), "ConvInteger": one(_conv_integer), "ConvTranspose": one(_conv_transpose), "MaxPool": max_pool,
    "AveragePool": one(_average_pool), "LpPool": one(_lp_pool), "GlobalMaxPool": _global("max"),
    "GlobalAveragePool": _global("mean"), "GlobalLpPool": _global("lp"),
}  # fmt: skip

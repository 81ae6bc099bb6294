"""Where the windows of a convolution lie, as the kernels count: two spatial axes, the first of length 1 if need be."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, attr_ints, attr_str
from qcompiler.ir.shapes import static_dim, static_shape
from qcompiler.quant.window import resolve_window


def conv_geometry(node: ir.Node, x: ir.Value, w: ir.Value, spatial: int) -> dict[str, Any] | None:
    """Return strides, dilations, pads and groups of a Conv, None where auto_pad depends on lengths that are not known.

    Args:
        node: the Conv.
        x: what it reads where it is called.
        w: its weight.
        spatial: 1 or 2 axes behind the channels.
    """
    strides = attr_ints(node, "strides") or (1,) * spatial
    dilations = attr_ints(node, "dilations") or (1,) * spatial
    pads = _pads(node, x, w, spatial, strides, dilations)
    if pads is None:
        return None
    return {
        "strides": strides if spatial == 2 else (1, *strides),
        "dilations": dilations if spatial == 2 else (1, *dilations),
        "pads": pads if spatial == 2 else (0, pads[0], 0, pads[1]),
        "group": attr_int(node, "group", 1),
        "layout": "NCHW",
    }


def _pads(
    node: ir.Node, x: ir.Value, w: ir.Value, spatial: int, strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the pads, those that auto_pad stands for too; None if they depend on unknown lengths."""
    mode = attr_str(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "", "VALID"):
        return (attr_ints(node, "pads") if mode != "VALID" else None) or (0,) * (2 * spatial)
    weight = static_shape(w)
    lengths = [static_dim(x, 2 + i) for i in range(spatial)]
    if weight is None or any(n is None for n in lengths):
        return None
    known = tuple(n for n in lengths if n is not None)
    window = resolve_window(weight[2:], known, strides=strides, dilations=dilations, auto_pad=mode)
    return (*window.begin, *window.end)

"""Nodes that stand for kernels of the project, in domain ``qcompiler.kernels``.

A node's operator is the kernel's name. Its attribute ``arguments`` names its inputs in order, as the kernel's contract
does; every other attribute is an option (text) or a number of the call, such as the geometry of a window. While passes
still change what a kernel does, its inputs are those of the fused call, by role: ``x``, ``xs``, ``xz``, ``w``, ``ws``,
``b``, ``ys``, ``yz`` (`qcompiler.patterns.qdq`); prepack-weights turns them into what the kernel reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import const_array
from qcompiler.ir.rewriter import Rewriter

KERNEL_DOMAIN = "qcompiler.kernels"
ARGUMENTS = "arguments"
FOLDED = "qcompiler.folded"
"""Metadata: names of the nodes whose work a kernel does besides its own, one to a line."""
FLOAT_LIMIT = 3.4028234663852886e38
"""Stands for infinity in bounds."""


def is_kernel(node: ir.Node | None, *names: str) -> bool:
    """Return whether a node stands for one of some kernels, or for any."""
    return node is not None and node.domain == KERNEL_DOMAIN and (not names or node.op_type in names)


def arguments_of(node: ir.Node) -> dict[str, ir.Value]:
    """Return the inputs of a kernel's node by their names."""
    names = node.attributes[ARGUMENTS].as_strings()
    found = {}
    for name, value in zip(names, node.inputs, strict=True):
        assert value is not None
        found[name] = value
    return found


def settings_of(node: ir.Node) -> dict[str, Any]:
    """Return options and numbers of a kernel's node."""
    return {name: a.value for name, a in node.attributes.items() if name != ARGUMENTS}


def number_of(value: ir.Value | None) -> float | None:
    """Return the one number of a constant, or None."""
    array = const_array(value)
    return float(np.asarray(array, np.float64).reshape(-1)[0]) if array is not None and array.size == 1 else None


def kernel_node(
    rewriter: Rewriter,
    kernel: str,
    arguments: Mapping[str, ir.Value | None],
    settings: Mapping[str, Any],
    *,
    before: ir.Node,
    origin: Sequence[ir.Node],
    name: str,
    outputs: int = 1,
) -> ir.Node:
    """Insert a kernel's node; arguments that are None are left out."""
    given = {key: value for key, value in arguments.items() if value is not None}
    attributes = {ARGUMENTS: tuple(given), **settings}
    return rewriter.node(
        kernel, list(given.values()), before=before, origin=origin, name=name, domain=KERNEL_DOMAIN,
        attributes=attributes, outputs=outputs,
    )  # fmt: skip


def stand_in(rewriter: Rewriter, old: ir.Node, made: ir.Node) -> None:
    """Let a new node take the place, the name and the output of an old one, which goes."""
    name = old.name or old.op_type
    if FOLDED in old.metadata_props:
        made.metadata_props[FOLDED] = old.metadata_props[FOLDED]
    old.name = rewriter.unique(f"{name}:was")
    made.name = name
    rewriter.take_over(old.outputs[0], made.outputs[0])
    rewriter.replace(old.outputs[0], made.outputs[0])
    rewriter.erase(old)


def scalar_params(scale: ir.Value | None, zero: ir.Value | None) -> tuple[np.float32, int] | None:
    """Return (scale, zero point) of constants per tensor, or None if they are something else."""
    size = const_array(scale)
    if size is None or size.size != 1:
        return None
    point = const_array(zero)
    if zero is not None and (point is None or point.size != 1):
        return None
    return np.float32(size.reshape(-1)[0]), 0 if point is None else int(point.reshape(-1).astype(np.int64)[0])


def stored(values: Array, out_scale: np.float32, out_zero: int) -> Array:
    """Return float64 numbers as int8 with a scale and a zero point: one rounding, in float64."""
    scaled = np.rint(values / np.float64(out_scale)) + out_zero
    return np.asarray(np.clip(scaled, -128, 127), np.int8)

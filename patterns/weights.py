"""Factors and offsets per channel, as an operator with constant weights takes them up.

``y = op(x, w) + b`` followed by ``y * k + t`` is ``op(x, w * k) + (b * k + t)`` with k and t per output channel;
preceded by ``x * k + t`` it is ``op(x, w * k) + (b + op(t, w))`` with k and t per input channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_float, attr_int, attr_ints, attr_str, const_array, is_const, rank_of, shape_of
from qcompiler.patterns.builder import Builder

Real = npt.NDArray[np.float64]
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose second input is a weight."""


@dataclass(frozen=True)
class Affine:
    """``value * scale + shift`` per channel; both are vectors of length C, or of length 1 for all channels alike."""

    scale: Real
    shift: Real


def real(value: ir.Value | None) -> Real | None:
    """Return a constant in float64, or None."""
    array = const_array(value)
    return None if array is None else np.asarray(array, dtype=np.float64)


def channel_vector(array: Array, axis: int, count: int) -> Real | None:
    """Return a constant operand as a vector along one axis of a value, or None if it varies along others.

    Args:
        array: the operand; it is broadcast to the value.
        axis: channel axis, counted from 0.
        count: rank of the value; an operand of higher rank would raise the rank of the result.
    """
    if array.ndim > count:
        return None
    full = np.asarray(array, dtype=np.float64).reshape((1,) * (count - array.ndim) + array.shape)
    if any(size != 1 for index, size in enumerate(full.shape) if index != axis):
        return None
    return full.reshape(-1)


def output_axis(node: ir.Node) -> tuple[int, int] | None:
    """Return (channel axis, rank) of the node's output, or None if the rank is unknown."""
    if node.op_type in ("Conv", "ConvTranspose"):
        count = rank_of(node.inputs[1])
        return None if count is None else (1, count)
    if node.op_type == "Gemm":
        return 1, 2
    count = rank_of(node.outputs[0])
    if count is None and (left := rank_of(node.inputs[0])) is not None:
        count = max(left, 2)
    return None if count is None else (count - 1, count)


def input_axis(node: ir.Node) -> tuple[int, int] | None:
    """Return (channel axis, rank) of the node's data input, or None if the rank is unknown."""
    if node.op_type in ("Conv", "ConvTranspose"):
        count = rank_of(node.inputs[1])
        return None if count is None else (1, count)
    if node.op_type == "Gemm":
        return (0 if attr_int(node, "transA", 0) else 1), 2
    count = rank_of(node.inputs[0])
    return None if count is None else (count - 1, count)


def channels(node: ir.Node) -> tuple[int, int]:
    """Return the number of (input, output) channels of a node with a constant weight."""
    shape = shape_of(node.inputs[1])
    assert shape is not None
    sizes = [int(d) for d in shape if isinstance(d, int)]
    group = attr_int(node, "group", 1)
    if node.op_type == "Conv":
        return sizes[1] * group, sizes[0]
    if node.op_type == "ConvTranspose":
        return sizes[0], sizes[1] * group
    if node.op_type == "Gemm" and attr_int(node, "transB", 0):
        return sizes[1], sizes[0]
    return sizes[0], sizes[1]


def weight_problem(node: ir.Node) -> str | None:
    """Return why the weight of a node cannot take up factors, or None."""
    weight = node.inputs[1]
    if weight is None or not is_const(weight):
        return "not-constant: the weight is computed at run time"
    if len(weight.uses()) > 1 or weight.is_graph_output():
        return f"shared-constant: {weight.name} is read {len(weight.uses())} times"
    if node.op_type in ("MatMul", "Gemm") and rank_of(weight) != 2:
        return f"rank: the weight has rank {rank_of(weight)}, expected 2"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not is_const(bias):
        return "not-constant: the bias is computed at run time"
    return None


def is_unpadded(node: ir.Node) -> bool:
    """Return whether a convolution reads nothing but its input."""
    if attr_str(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    return not any(attr_ints(node, "pads") or ())


def _scaled_out(node: ir.Node, weight: Array, scale: Real) -> Real:
    """Return the weight in float64 with each output channel multiplied."""
    wide = np.asarray(weight, dtype=np.float64)
    if scale.size == 1:
        return np.asarray(wide * scale.reshape(()), dtype=np.float64)
    if node.op_type == "Conv":
        return np.asarray(wide * scale.reshape(-1, *[1] * (wide.ndim - 1)), dtype=np.float64)
    if node.op_type == "ConvTranspose":
        group = attr_int(node, "group", 1)
        parts = wide.reshape(group, wide.shape[0] // group, *wide.shape[1:])
        factor = scale.reshape(group, 1, wide.shape[1], *[1] * (wide.ndim - 2))
        return np.asarray((parts * factor).reshape(wide.shape), dtype=np.float64)
    if node.op_type == "Gemm" and attr_int(node, "transB", 0):
        return np.asarray(wide * scale.reshape(-1, 1), dtype=np.float64)
    return np.asarray(wide * scale.reshape(1, -1), dtype=np.float64)


def _scaled_in(node: ir.Node, weight: Array, scale: Real) -> Real:
    """Return the weight in float64 with each input channel multiplied."""
    wide = np.asarray(weight, dtype=np.float64)
    if scale.size == 1:
        return np.asarray(wide * scale.reshape(()), dtype=np.float64)
    if node.op_type == "Conv":
        group = attr_int(node, "group", 1)
        parts = wide.reshape(group, wide.shape[0] // group, *wide.shape[1:])
        factor = scale.reshape(group, 1, wide.shape[1], *[1] * (wide.ndim - 2))
        return np.asarray((parts * factor).reshape(wide.shape), dtype=np.float64)
    if node.op_type == "ConvTranspose":
        return np.asarray(wide * scale.reshape(-1, *[1] * (wide.ndim - 1)), dtype=np.float64)
    if node.op_type == "Gemm" and attr_int(node, "transB", 0):
        return np.asarray(wide * scale.reshape(1, -1), dtype=np.float64)
    return np.asarray(wide * scale.reshape(-1, 1), dtype=np.float64)


def _response(node: ir.Node, weight: Array, shift: Real) -> Real:
    """Return what a constant input of ``shift`` per input channel gives at each output channel (no padding)."""
    shift = np.broadcast_to(shift, (channels(node)[0],)).astype(np.float64)
    scaled = _scaled_in(node, weight, shift)
    if node.op_type == "Conv":
        return np.asarray(scaled.reshape(scaled.shape[0], -1).sum(axis=1), dtype=np.float64)
    alpha = attr_float(node, "alpha", 1.0) if node.op_type == "Gemm" else 1.0
    axis = 1 if node.op_type == "Gemm" and attr_int(node, "transB", 0) else 0
    return np.asarray(alpha * scaled.sum(axis=axis), dtype=np.float64)


def _bias(node: ir.Node) -> Real:
    """Return the bias with a Gemm's beta, as a vector of length 1 or C."""
    bias = real(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None:
        return np.zeros(1)
    beta = attr_float(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.asarray(bias.reshape(-1) * beta, dtype=np.float64)


def bias_problem(node: ir.Node) -> str | None:
    """Return why a Gemm's C is not one number per output channel, or None."""
    shape = shape_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if shape and any(d != 1 for d in shape[:-1]):
        return "bias-shape: the bias varies over the rows"
    return None


def folded_after(node: ir.Node, affine: Affine) -> tuple[Real, Real]:
    """Return (weight, bias) in float64 of a node that also does ``affine`` on its output."""
    weight = const_array(node.inputs[1])
    assert weight is not None
    count = channels(node)[1]
    bias = np.broadcast_to(_bias(node) * affine.scale + affine.shift, (count,))
    return _scaled_out(node, weight, affine.scale), np.asarray(bias, dtype=np.float64)


def folded_before(node: ir.Node, affine: Affine) -> tuple[Real, Real]:
    """Return (weight, bias) in float64 of a node that also does ``affine`` on its input; see `is_unpadded`."""
    weight = const_array(node.inputs[1])
    assert weight is not None
    count = channels(node)[1]
    response = _response(node, weight, affine.shift) if affine.shift.any() else np.zeros(1)
    bias = np.broadcast_to(_bias(node) + response, (count,))
    return _scaled_in(node, weight, affine.scale), np.asarray(bias, dtype=np.float64)


def narrowed(array: Real, like: ir.Value) -> Array | None:
    """Return ``array`` in the element type of ``like``, or None if a finite number does not fit."""
    assert like.dtype is not None
    with np.errstate(over="ignore", invalid="ignore"):
        made = array.astype(like.dtype.numpy())
    fits = np.isfinite(np.asarray(made, dtype=np.float64)).all()
    return made if fits else None


def rebuild(b: Builder, node: ir.Node, x: ir.Value, parts: tuple[Real, Real], bias: bool) -> ir.Value:
    """Insert a copy of a weighted node on ``x`` with new weights.

    Args:
        b: the builder.
        node: the node to copy.
        x: its data input.
        parts: weight and bias in float64.
        bias: whether the copy has a bias.
    """
    old = node.inputs[1]
    assert old is not None
    weight = narrowed(parts[0], old)
    assert weight is not None
    inputs: list[ir.Value | None] = [x, old]
    if not np.array_equal(weight, const_array(old)):  # type: ignore[arg-type]
        inputs[1] = b.constant(weight, f"{old.name}:folded")
    if bias:
        vector = narrowed(parts[1], old)
        assert vector is not None
        inputs.append(b.constant(vector, f"{node.name}:bias"))
    drop = ("beta",) if node.op_type == "Gemm" else ()
    like = b.match.root.outputs[0]
    if node.op_type == "MatMul" and bias:
        return b.op("Gemm", *inputs, like=like)
    return b.clone(node, *inputs, like=like, drop=drop)

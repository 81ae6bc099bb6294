"""Stored bytes of weights per group and form, and which weights several groups share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, const_array, consumers, is_const
from qcompiler.quant.spec import QuantSpec
from qcompiler.search.borders import form_of
from qcompiler.search.forms_problem import Sizes
from qcompiler.targets.groups import Group, block_axis, block_of
from qcompiler.targets.points import activation_spec, weight_spec
from qcompiler.targets.target import Target

_SCALE_BYTES = {"": 4, "float8e4m3fn": 1, "float8e8m0": 1}
_OUTER_BYTES = 4
_NBITS, _NBITS_BLOCK = "MatMulNBits", 32
"""Operator that packs a weight in blocks, and its block where a target has one scale per column."""


def weight_bytes(group: Group, option: str, target: Target) -> int:
    """Return the bytes of a group's constants as one option stores them: weights, scales, zero points, bias.

    Scale and zero point of activations (5 bytes per value that is stored quantized) are not in it.

    Args:
        group: a fusion group.
        option: a form, or an option with its form in front.
        target: gives the formats.
    """
    return sum(stored_bytes(group, node, index, option, target) for node, index in _constants(group))


def fixed_bytes(model: ir.Model, groups: Sequence[Group]) -> int:
    """Return the bytes of all constants that no choice of forms changes, and of those that more than it reads."""
    chosen = {node.inputs[index] for group in groups for node, index in _constants(group)}
    shared = shared_weights(groups)
    readers = _readers(groups)
    total = 0
    for graph in all_graphs(model):
        for value in graph.initializers.values():
            if value.const_value is None:
                continue
            if value not in chosen or _stays(value, readers, shared):
                total += value.const_value.nbytes
    return total


def shared_weights(groups: Sequence[Group]) -> dict[str, tuple[str, ...]]:
    """Return the groups that read each weight, by its name, where more than one does: it is stored once per format."""
    readers: dict[str, dict[str, None]] = {}
    for group in groups:
        for weight in weights_of(group):
            readers.setdefault(str(weight.name), {})[group.name] = None
    return {name: tuple(found) for name, found in readers.items() if len(found) > 1}


def stored_sizes(
    model: ir.Model, groups: Sequence[Group], target: Target, allowed: Mapping[str, Sequence[str]]
) -> Sizes:
    """Return the bytes of every option, for the planner.

    Args:
        model: the canonical FLOAT graph.
        groups: its fusion groups.
        target: gives the formats.
        allowed: options besides float, by group.
    """
    readers, shared = _readers(groups), shared_weights(groups)
    sizes: dict[str, dict[str, int]] = {}
    bits: dict[str, dict[str, int]] = {}
    common: dict[str, dict[str, int]] = {}
    elements: dict[str, int] = {}
    for group in groups:
        weights = weights_of(group)
        elements |= {str(weight.name): _size(weight) for weight in weights}
        own, own_bits = sizes.setdefault(group.name, {}), bits.setdefault(group.name, {})
        for option in ("float", *allowed.get(group.name, ())):
            own[option] = own_bits[option] = 0
            for node, index in _constants(group):
                value = node.inputs[index]
                assert value is not None
                kept, plain = _stays(value, readers, shared), form_of(option) == "float"
                count = stored_bytes(group, node, index, option, target)
                if value in weights and str(value.name) in shared:
                    common.setdefault(str(value.name), {})[option] = count
                    continue
                own[option] += 0 if plain and kept else count
                if value in weights:
                    own_bits[option] += 8 * (count + (_float_bytes(value, target) if kept and not plain else 0))
    return Sizes(sizes, common, shared, fixed_bytes(model, groups), sum(elements.values()), bits)


def stored_bytes(group: Group, node: ir.Node, index: int, option: str, target: Target) -> int:
    """Return the bytes of one constant input of a group in an option."""
    value = node.inputs[index]
    assert value is not None
    form, row = form_of(option), group.row
    if form == "float":
        return _float_bytes(value, target)
    if row.kind == "recurrent":
        return _quantized(value, weight_spec(target))
    if row.kind == "weighted":
        return (_weight_bytes if index == row.weight else _bias_bytes)(group, value, form, target)
    return _quantized(value, activation_spec(target))


def _constants(group: Group) -> Iterator[tuple[ir.Node, int]]:
    """Yield the root's constant inputs that some form stores in another way, each constant once."""
    row, seen = group.row, set()
    if row.kind == "weighted":
        indices: Sequence[int] = (row.weight, row.bias)
    elif row.kind == "recurrent":
        indices = (1, 2)
    else:
        indices = group.data_indices if row.kind == "arithmetic" else ()
    for index in indices:
        value = group.root.inputs[index] if 0 <= index < len(group.root.inputs) else None
        if value is not None and is_const(value) and value not in seen:
            seen.add(value)
            yield group.root, index


def weights_of(group: Group) -> tuple[ir.Value, ...]:
    """Return the constant weights of a group, without its bias: one, two of a recurrent operator, or none."""
    indices = (1, 2) if group.row.kind == "recurrent" else (group.row.weight,)
    found = (group.root.inputs[index] for index in indices if 0 <= index < len(group.root.inputs))
    return tuple(value for value in dict.fromkeys(found) if value is not None and is_const(value))


def _readers(groups: Sequence[Group]) -> dict[tuple[ir.Node, ir.Value], str]:
    """Return the group for each pair of a node and a constant of it that forms store in another way."""
    found = {}
    for group in groups:
        for node, index in _constants(group):
            value = node.inputs[index]
            assert value is not None
            found[node, value] = group.name
    return found


def _stays(
    value: ir.Value, readers: Mapping[tuple[ir.Node, ir.Value], str], shared: Mapping[str, tuple[str, ...]]
) -> bool:
    """Return whether the float copy of a constant is there whatever one group chooses."""
    nodes = consumers(value)
    if value.is_graph_output() or any((node, value) not in readers for node in nodes):
        return True
    return len(nodes) > 1 and str(value.name) not in shared


def _size(value: ir.Value) -> int:
    array = const_array(value) if value.const_value is None else None
    return int(array.size) if array is not None else math.prod(_dims(value))


def _dims(value: ir.Value) -> tuple[int, ...]:
    if value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    array = const_array(value)
    return () if array is None else array.shape


def _float_bytes(value: ir.Value, target: Target) -> int:
    dtype = value.const_value.dtype if value.const_value is not None else value.dtype
    if dtype is None:
        return 0
    half = target.float_type != "float32" and dtype == ir.DataType.FLOAT
    return math.ceil(_size(value) * (2.0 if half else dtype.itemsize))


def _weight_bytes(group: Group, value: ir.Value, form: str, target: Target) -> int:
    axis = group.row.weight_axis
    spec = replace(weight_spec(target), axis=None if axis is None else axis % max(len(_dims(value)), 1))
    if (block := block_of(target, group.root)) is not None:
        spec = replace(spec, axis=block_axis(group.root), block=block, scale_format=target.weight_scale)
    if form == "weight-only" and group.row.emit.get(form) == _NBITS and len(_dims(value)) == 2:
        return _packed(value, spec)
    return _quantized(value, spec)


def _packed(value: ir.Value, spec: QuantSpec) -> int:
    """Return the bytes of MatMulNBits's weight: blocks along K, each with its scale and, if need be, zero point."""
    length, columns = _dims(value)
    block = spec.block or _NBITS_BLOCK
    blocks = -(-length // block)
    bits = spec.storage.bits
    zeros = 0 if spec.symmetric else columns * math.ceil(blocks * bits / 8)
    return columns * blocks * block * bits // 8 + 4 * columns * blocks + zeros


def _quantized(value: ir.Value, spec: QuantSpec) -> int:
    """Return the bytes of a tensor, its scales and its zero points."""
    dims, bits = _dims(value), spec.storage.bits
    scales = 1
    if spec.axis is not None:
        scales = dims[spec.axis]
        if spec.block:
            scales = math.prod(dims) // max(dims[spec.axis], 1) * -(-dims[spec.axis] // spec.block)
    zeros = 0 if spec.block and spec.symmetric else math.ceil(scales * bits / 8)
    outer = _OUTER_BYTES if spec.scale_format == "float8e4m3fn" else 0
    return math.ceil(math.prod(dims) * bits / 8) + scales * _SCALE_BYTES[spec.scale_format] + zeros + outer


def _bias_bytes(group: Group, value: ir.Value, form: str, target: Target) -> int:
    if form != "static" or target.bias != "int32":
        return _float_bytes(value, target)
    numbers = _size(value)
    scales = 1 if group.row.weight_axis is None else numbers
    return 4 * numbers + 8 * scales  # int32 numbers; a float32 scale and an int32 zero point for each scale

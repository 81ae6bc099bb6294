"""What an engine made of the operators of a given Q/DQ model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from qcompiler.backends.readback import INTEGER_KERNELS
from qcompiler.explaining.given import Unit, is_conversion
from qcompiler.ir.graph import all_nodes, consumers

_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/\w+Fusion/?)$")
"""What ONNX Runtime appends to the names of nodes that it rewrites."""


def _stems(name: str) -> Iterator[str]:
    """Yield a name, and what is left of it as the engine's suffixes come off."""
    yield name
    while (stem := _SUFFIX.sub("", name)) != name:
        yield stem
        name = stem


def kernels(units: Sequence[Unit], executed: ir.Model) -> dict[str, tuple[str, bool]]:
    """Return, by operator name, (the engine's kernel, whether it computes on integers).

    An operator that is not found under its name was fused into another, or moved away.

    Args:
        units: the operators of the given model.
        executed: the engine's graph after its optimizations.
    """
    nodes = list(all_nodes(executed))
    by_name: dict[str, list[ir.Node]] = {}
    for node in nodes:
        for stem in _stems(str(node.name)):
            by_name.setdefault(stem, []).append(node)
    found: dict[str, tuple[str, bool]] = {}
    for unit in units:
        named = [n for n in by_name.get(str(unit.node.name), []) if not is_conversion(n) and n.op_type != "Transpose"]
        named = named or [n for n in by_name.get(str(unit.node.name), []) if n.op_type == unit.node.op_type]
        if named:
            best = next((n for n in named if n.op_type in INTEGER_KERNELS), named[0])
            found[str(unit.node.name)] = (best.op_type, best.op_type in INTEGER_KERNELS or _moves_integers(best))
    return found


def _moves_integers(node: ir.Node) -> bool:
    """Return whether a kernel for any type stands between integers: neither a DQ in front nor a Q behind."""
    value = node.inputs[0] if node.inputs else None
    before = None if value is None else value.producer()
    if is_conversion(before, "DequantizeLinear"):
        return False
    behind = [n for v in node.outputs for n in consumers(v)]
    if any(is_conversion(n, "QuantizeLinear") for n in behind):
        return False
    integer = before is not None and (is_conversion(before, "QuantizeLinear") or before.op_type in INTEGER_KERNELS)
    return integer or any(is_conversion(n, "DequantizeLinear") or n.op_type in INTEGER_KERNELS for n in behind)

"""The predicates of legality tables about operators, and what quantizes their operands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qcompiler.ir.graph import attr_int, is_const, is_op, shape_of
from qcompiler.targets.legality_parameters import Finding
from qcompiler.targets.quantized_view import Operand, QuantizedView, float_of, type_of

_INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")

ANY = "*"
"""Stands for operators of every domain."""


@dataclass(frozen=True)
class FloatTypesMeet:
    """Refuse operators that read floats of two types, one from DequantizeLinear (whose result has the scale's type)."""

    operators: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if not is_op(node, *self.operators):
                continue
            types = sorted({found for value in node.inputs if (found := float_of(value))})
            if len(types) > 1 and any(view.of(value) is not None for value in node.inputs):
                yield node, f"operands are {' and '.join(types)}; expected one float type"


@dataclass(frozen=True)
class MixedStoredTypes:
    """Refuse operators whose quantized operands have different stored types.

    Weights of the types ``except_weight`` may differ; the types ``alike`` count as one.
    """

    operators: tuple[str, ...]
    except_weight: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if not is_op(node, *self.operators):
                continue
            several = node.inputs if node.op_type == "Concat" else node.inputs[:2]
            sources = [q for q in map(view.of, several) if q is not None]
            types = {q.stored for q in sources if not (q.constant and q.stored in self.except_weight)}
            if len(types) > 1 and not types <= set(self.alike):
                yield node, f"operands are stored as {' and '.join(sorted(types))}; expected one type"


@dataclass(frozen=True)
class Operators:
    """Refuse operators by name, those of one domain: empty for ONNX's own, ``*`` for any."""

    refused: tuple[str, ...]
    domain: str = ""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if is_op(node, *self.refused, domain=node.domain if self.domain == ANY else self.domain):
                yield node, f"the operator is {f'{node.domain}.' if node.domain else ''}{node.op_type}"


@dataclass(frozen=True)
class OperatorOnTypes:
    """Refuse operators that compute in given float types."""

    refused: tuple[str, ...]
    types: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if is_op(node, *self.refused) and (found := float_of(node.inputs[0])) in self.types:
                yield node, f"{node.op_type} computes in {found}"


@dataclass(frozen=True)
class WeightPerChannel:
    """Refuse operators whose weight scale (input ``scale``) has more than one number."""

    operators: tuple[str, ...]
    scale: int

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if is_op(node, *self.operators) and len(node.inputs) > self.scale:
                shape = shape_of(node.inputs[self.scale])
                if shape and any(d != 1 for d in shape):
                    yield node, f"the weight has scales of shape {list(shape)}; expected one scale"


@dataclass(frozen=True)
class WeightAxis:
    """Refuse weight scales that do not lie on the wanted axis of a product: its ``output`` or its ``reduced`` one.

    ``granularity`` is ``channel`` or ``block``; ``operators`` limits the products, ``stored`` the types.
    """

    expected: str
    granularity: str
    operators: tuple[str, ...]
    stored: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield the dequantizations of such weights."""
        for operand in view.operands:
            q = operand.source
            if q is None or not q.constant or q.axis is None or operand.node.op_type not in self.operators:
                continue
            if (self.granularity == "block") != bool(q.block) or (self.stored and q.stored not in self.stored):
                continue
            wanted = operand.output_axis() if self.expected == "output" else operand.reduced_axis()
            if wanted is not None and wanted != q.axis:
                yield q.node, f"scales lie on axis {q.axis}; expected {wanted}, the {self.expected} axis"


@dataclass(frozen=True)
class OneOperandQuantized:
    """Find products of which one operand is quantized; weights of the stored types ``weights`` may be."""

    operators: tuple[str, ...]
    weights: tuple[str, ...] = ()

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such products."""
        for node, (left, right) in _products(view, self.operators):
            if (left.source is None) == (right.source is None):
                continue
            quantized = left.source or right.source
            if quantized is not None and not (quantized.constant and quantized.stored in self.weights):
                yield (
                    node,
                    f"the {'right' if left.source else 'left'} operand is float; expected both quantized, or none",
                )


@dataclass(frozen=True)
class StoredOperand:
    """Refuse products with an operand of the given stored types where the other one is ``quantized`` or ``float``.

    ``weights`` limits it to constant operands.
    """

    operators: tuple[str, ...]
    stored: tuple[str, ...]
    other: str = ""
    weights: bool = False

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such products."""
        for node, (left, right) in _products(view, self.operators):
            for mine, other in ((left, right), (right, left)):
                state, source = "quantized" if other.source is not None else "float", mine.source
                if source is None or source.stored not in self.stored or (self.weights and not source.constant):
                    continue
                if self.other in ("", state):
                    beside = f", the other one is {state}" if self.other else ""
                    yield node, f"{node.op_type} reads a {source.stored} operand{beside}"


def _products(view: QuantizedView, operators: tuple[str, ...]) -> Iterator[tuple[ir.Node, tuple[Operand, Operand]]]:
    for left, right in zip(view.operands[::2], view.operands[1::2], strict=True):
        if left.node.op_type in operators:
            yield left.node, (left, right)


@dataclass(frozen=True)
class StoredConstantUse:
    """Refuse stored constants that anything but DequantizeLinear reads: no operator may come in between."""

    stored: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield the nodes in between."""
        for node in view.nodes:
            if node.domain not in ("", "ai.onnx") or _is_quantization(node) or node.op_type in _INTEGER_OPERATORS:
                continue
            for value in node.inputs:
                if type_of(value) in self.stored and is_const(value):
                    yield node, f"{node.op_type} reads a constant stored as {type_of(value)}; expected DequantizeLinear"


def _is_quantization(node: ir.Node) -> bool:
    return node.op_type in ("DequantizeLinear", "QuantizeLinear")


@dataclass(frozen=True)
class Follows:
    """Find a quantization between an operator and its activation, which then cannot fuse into the operator."""

    operators: tuple[str, ...]
    activations: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield the QuantizeLinear in between."""
        for node in view.nodes:
            q = view.of(node.inputs[0]) if is_op(node, *self.activations) and node.inputs else None
            first = None if q is None or q.node.inputs[0] is None else q.node.inputs[0].producer()
            if first is None or not _is_quantization(first) or first.inputs[0] is None:
                continue
            before = first.inputs[0].producer()
            if before is not None and is_op(before, *self.operators):
                yield first, f"it lies between {before.op_type} and {node.op_type}; expected behind {node.op_type}"


@dataclass(frozen=True)
class ReadsQuantized:
    """Find operators of which an input is dequantized, although they run in float."""

    operators: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if is_op(node, *self.operators) and any(view.of(value) is not None for value in node.inputs):
                yield node, f"{node.op_type} reads quantized numbers"


@dataclass(frozen=True)
class MatMulNBits:
    """Refuse com.microsoft MatMulNBits outside the given bits, blocks and float types."""

    bits: tuple[int, ...]
    blocks: tuple[int, ...]
    types: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if not is_op(node, "MatMulNBits", domain="com.microsoft"):
                continue
            bits, block = attr_int(node, "bits", 4), attr_int(node, "block_size", 0)
            found = float_of(node.inputs[0])
            if bits not in self.bits or block not in self.blocks or (found and found not in self.types):
                yield node, f"{bits} bits, blocks of {block}, {found or 'unknown'} activations"


@dataclass(frozen=True)
class NamesShared:
    """Refuse Q/DQ nodes with the name of another node or initializer, or in a function that is called twice."""

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes of the original model."""
        for node, name in view.shared_names:
            yield node, f"the name {name!r} stands for more than this node; expected a name of its own"


@dataclass(frozen=True)
class OneTensorThrice:
    """Refuse operators whose first three inputs are one and the same tensor."""

    operators: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such nodes."""
        for node in view.nodes:
            if is_op(node, *self.operators) and len(node.inputs) >= 3 and len(set(node.inputs[:3])) == 1:
                yield node, "one tensor is all three inputs; expected at least two"


@dataclass(frozen=True)
class MovedAcrossTypes:
    """Refuse one operator that moves elements between a dequantization and a quantization to another stored type.

    Only pairs with one scale each are meant.
    """

    movers: tuple[str, ...]

    def find(self, view: QuantizedView) -> Iterator[Finding]:
        """Yield such quantizations."""
        for q in view.quantized:
            mover = None if not q.quantizes or q.node.inputs[0] is None else q.node.inputs[0].producer()
            if mover is None or not is_op(mover, *self.movers) or q.axis is not None:
                continue
            several = mover.inputs if mover.op_type == "Concat" else mover.inputs[:1]
            types = {s.stored for s in map(view.of, several) if s is not None and s.axis is None} - {q.stored}
            if types:
                yield q.node, f"{mover.op_type} moves {' and '.join(sorted(types))}; expected {q.stored}, as behind it"

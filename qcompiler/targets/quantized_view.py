"""A read-only view of a model's quantization: every QuantizeLinear and DequantizeLinear, and who multiplies them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
from onnx_ir.passes import PassError as IrPassError
from onnx_ir.passes import PreconditionError
from onnx_ir.passes.common import InlinePass

from qcompiler.engine import Array
from qcompiler.errors import ModelError
from qcompiler.ir.graph import (
    all_graphs,
    all_nodes,
    attr_int,
    attr_ints,
    const_array,
    is_const,
    is_op,
    rank_of,
    shape_of,
)
from qcompiler.ir.importer import prepare
from qcompiler.ir.reader import read_model
from qcompiler.ir.schemas import onnx_opset
from qcompiler.ir.shapes import infer_shapes

Shape = tuple[int | str | None, ...]

DOMAINS = ("", "com.microsoft")
"""Domains that have QuantizeLinear and DequantizeLinear."""

FLOATS = ("float", "float16", "bfloat16")
"""Element types that products are computed in."""

_DYNAMIC_FP4 = "TRT_FP4DynamicQuantize"
"""TensorRT's operator that writes FP4 numbers and their FP8 block scales, found at run time."""

_STILL = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


@dataclass(frozen=True)
class Quantized:
    """One QuantizeLinear or DequantizeLinear.

    Attributes:
        node: the node.
        quantizes: QuantizeLinear if true.
        stored: element type of the stored numbers, lower case; empty if unknown.
        declared: the stored type is said by the zero point, by ``output_dtype`` or by the data, not by default.
        constant: the numbers are known at compile time, so it is a weight.
        behind: a DequantizeLinear of what a QuantizeLinear with the same scale wrote: the latter is judged.
        shape: shape of the data, None if unknown.
        scale_shape: shape of the scale, None if unknown.
        axis: axis of the scales or of the blocks, not negative; None for one scale.
        block: elements that share a scale along the axis; 0 without blocks.
    """

    node: ir.Node
    quantizes: bool
    stored: str
    declared: bool
    constant: bool
    behind: bool
    shape: Shape | None
    scale_shape: Shape | None
    axis: int | None
    block: int

    @property
    def scale(self) -> ir.Value | None:
        """Return the scale."""
        return self.node.inputs[1]

    @property
    def zero(self) -> ir.Value | None:
        """Return the zero point, None without one."""
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def scale_type(self) -> str:
        """Return the element type of the scale, empty if unknown."""
        return type_of(self.scale)

    @cached_property
    def scales(self) -> Array | None:
        """Return the numbers of a constant scale."""
        return const_array(self.scale)


@dataclass(frozen=True)
class Operand:
    """One of the two factors of a product.

    Attributes:
        node: the product.
        index: 0 for the left or data side, 1 for the right side or the kernel.
        source: what dequantizes it; None for float.
        constant: it is known at compile time.
        turned: axis of the source that became each axis of the operand; None if a Reshape hides it.
    """

    node: ir.Node
    index: int
    source: Quantized | None
    constant: bool
    turned: tuple[int, ...] | None

    def output_axis(self) -> int | None:
        """Return the axis of the source that counts the product's outputs, None if unknown."""
        return self._of_source(self._axes()[0])

    def reduced_axis(self) -> int | None:
        """Return the axis of the source that the product sums over, None if unknown."""
        return self._of_source(self._axes()[1])

    def _axes(self) -> tuple[int, int]:
        if self.node.op_type == "Conv":
            return 0, 1
        if self.node.op_type == "ConvTranspose":
            return 1, 0
        turned = self.node.op_type == "Gemm" and attr_int(self.node, "transB" if self.index else "transA", 0) == 1
        last_is_output = (self.index == 1) != turned
        return (-1, -2) if last_is_output else (-2, -1)

    def _of_source(self, axis: int) -> int | None:
        if self.turned is None or not -len(self.turned) <= axis < len(self.turned):
            return None
        return self.turned[axis]


def found_at_run_time(value: ir.Value | None) -> bool:
    """Return whether TensorRT's own dynamic quantization writes a value: numbers or block scales."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type == _DYNAMIC_FP4


def two_level(scale: ir.Value | None) -> bool:
    """Return whether block scales are themselves stored numbers (of a weight or of a dynamic quantization), dequantized
    by a constant: the form of NVFP4."""
    node = None if scale is None else scale.producer()
    if not is_op(node, "DequantizeLinear") or node is None or not is_const(node.inputs[1]):
        return False
    return is_const(node.inputs[0]) or found_at_run_time(node.inputs[0])


class QuantizedView:
    """What the rules ask of a model; the model is copied, its functions are inlined and its types inferred.

    Attributes:
        model: the copy.
        opset: its ONNX operator set.
        nodes: all nodes of the copy, bodies of If, Loop and Scan included.
        quantized: all QuantizeLinear and DequantizeLinear.
        shared_names: those of the original, with their names, that have the name of another node or initializer.
    """

    def __init__(self, model: ir.Model) -> None:
        """Read a model.

        Raises:
            ModelError: its local functions cannot be inlined.
        """
        self.shared_names = tuple(_shared_names(model))
        self.model = read_model(model)
        prepare(self.model)
        if self.model.functions:
            try:
                InlinePass()(self.model)
            except (IrPassError, PreconditionError, ValueError, KeyError) as error:
                raise ModelError(f"cannot inline the model's functions: {error}") from error
        infer_shapes(self.model, trust=False)
        self.opset = onnx_opset(self.model)
        self.nodes = tuple(all_nodes(self.model))
        self.quantized = tuple(q for q in map(_quantized, self.nodes) if q is not None)
        self._by_node = {q.node: q for q in self.quantized}

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Return the factors of all products, two per product."""
        return tuple(o for node in self.nodes if is_op(node, *_PRODUCTS) for o in self._factors(node))

    def of(self, value: ir.Value | None) -> Quantized | None:
        """Return what dequantized a value, looked for through operators that only rename axes."""
        return self._trace(value)[0]

    def _factors(self, node: ir.Node) -> Iterator[Operand]:
        for index, value in enumerate(node.inputs[:2]):
            source, constant, turned = self._trace(value)
            yield Operand(node, index, source, constant, turned)

    def _trace(self, value: ir.Value | None) -> tuple[Quantized | None, bool, tuple[int, ...] | None]:
        """Return the dequantization behind a value, whether the value is a constant, and its axes there."""
        rank = rank_of(value)
        turned = None if rank is None else tuple(range(rank))
        while value is not None and (node := value.producer()) is not None:
            if (found := self._by_node.get(node)) is not None and not found.quantizes:
                return found, found.constant, turned
            if is_op(node, "Transpose"):
                order = attr_ints(node, "perm") or (tuple(range(rank))[::-1] if rank is not None else None)
                fits = turned is not None and order is not None and len(order) == len(turned)
                turned = tuple(order[a] for a in turned) if fits and order and turned else None
            elif is_op(node, *_STILL):
                turned = turned if node.op_type == "Identity" else None
            else:
                return None, is_const(value), turned
            value = node.inputs[0]
        return None, is_const(value), turned


def _shared_names(model: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    """Yield the named Q/DQ nodes, as the file has them, whose name another node or an initializer has, too."""
    nodes = list(all_nodes(model))
    inside = [node for f in model.functions.values() for node in ir.traversal.RecursiveGraphIterator(f)]
    called = Counter(node.op_identifier() for node in (*nodes, *inside))
    taken = Counter(name for graph in all_graphs(model) for name in graph.initializers)
    taken.update(node.name for node in (*nodes, *inside) if node.name)
    for function in model.functions.values():
        if called[function.identifier()] > 1:
            taken.update(node.name for node in ir.traversal.RecursiveGraphIterator(function) if node.name)
    for node in (*nodes, *inside):
        if (
            node.name
            and taken[node.name] > 1
            and any(_is_linear(node, f"{k}Linear") for k in ("Quantize", "Dequantize"))
        ):
            yield node, node.name


def type_of(value: ir.Value | None) -> str:
    """Return the name of a value's element type in lower case, empty if unknown."""
    if value is None:
        return ""
    if value.dtype is None and value.const_value is not None:
        return value.const_value.dtype.name.lower()
    return "" if value.dtype is None else value.dtype.name.lower()


def float_of(value: ir.Value | None) -> str:
    """Return the float type of a value; behind DequantizeLinear it is the scale's, whatever inference says."""
    node = None if value is None else value.producer()
    if node is not None and _is_linear(node, "DequantizeLinear"):
        asked = attr_int(node, "output_dtype", 0)
        return ir.DataType(asked).name.lower() if asked else type_of(node.inputs[1])
    found = type_of(value)
    return found if found in FLOATS else ""


def _is_linear(node: ir.Node, op_type: str) -> bool:
    return any(is_op(node, op_type, domain=domain) for domain in DOMAINS)


def _quantized(node: ir.Node) -> Quantized | None:
    quantizes = _is_linear(node, "QuantizeLinear")
    if len(node.inputs) < 2 or not (quantizes or _is_linear(node, "DequantizeLinear")):
        return None
    data, scale = node.inputs[0], node.inputs[1]
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    before = None if quantizes or data is None else data.producer()
    source = before if before is not None and _is_linear(before, "QuantizeLinear") else None
    shape, scale_shape = shape_of(data), shape_of(scale)
    asked = attr_int(node, "output_dtype", 0) if quantizes else 0
    stored = type_of(zero) or (ir.DataType(asked).name.lower() if asked else "")
    if not quantizes:
        stored = (type_of(data) if source is None else _written(source)) or stored
    axis, block = _layout(node, shape, scale_shape)
    return Quantized(
        node,
        quantizes,
        stored or ("uint8" if quantizes else ""),
        bool(stored),
        is_const(data) or (source is not None and is_const(source.inputs[0])),
        source is not None and source.inputs[1] is scale,
        shape,
        scale_shape,
        axis,
        block,
    )


def _written(node: ir.Node) -> str:
    """Return what a QuantizeLinear writes, as its own row says; inference may be older than its types."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    asked = attr_int(node, "output_dtype", 0)
    return type_of(zero) or (ir.DataType(asked).name.lower() if asked else "")


def _layout(node: ir.Node, shape: Shape | None, scale_shape: Shape | None) -> tuple[int | None, int]:
    """Return axis and block; the block comes from the attribute, or from lengths that divide."""
    if not scale_shape:
        return None, 0
    axis = attr_int(node, "axis", 1)
    axis += len(shape) if axis < 0 and shape is not None else 0
    block = attr_int(node, "block_size", 0)
    if len(scale_shape) > 1 or block:
        return axis, block or _divided(shape, scale_shape, axis)
    return (None, 0) if scale_shape == (1,) else (axis, 0)


def _divided(shape: Shape | None, scale_shape: Shape, axis: int) -> int:
    whole = shape[axis] if shape is not None and 0 <= axis < len(shape) else None
    parts = scale_shape[axis] if 0 <= axis < len(scale_shape) else None
    return -(-whole // parts) if isinstance(whole, int) and isinstance(parts, int) and parts else 1

"""Why an engine does not fuse the Q/DQ of a model as it was given: the engine's rules, asked of the graph itself.

The rules are ONNX Runtime's (its QDQ selectors, read in its sources and seen on 1.31 on x86); what the engine really
made of the model decides whether there is anything to explain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompiler.explaining.causes import Cause, cause
from qcompiler.ir.graph import (
    attr_float,
    attr_int,
    attr_ints,
    attr_str,
    const_array,
    consumers,
    is_const,
    is_op,
    single_consumer,
)
from qcompiler.patterns.scales import same_params
from qcompiler.quant.formats import FORMATS, format_of
from qcompiler.targets.target import Target

_WEIGHTED = ("Conv", "MatMul", "Gemm")
_NEEDS_OUTPUT = (
    "Conv", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Where",
)  # fmt: skip
_MOVERS = (
    "Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
    "Unsqueeze", "MaxPool", "ReduceMax", "ReduceMin", "Resize", "DepthToSpace",
)  # fmt: skip
_OTHERS = ("ArgMax",)
_ACTIVATIONS = ("Relu", "Clip")
_ONLY_DATA = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat")
"""Operators all of whose inputs are data (a bias apart); of the others the first is, of Where the second and third."""
_BIAS_TOLERANCE = (1e-2, 1e-6)
"""By which the scale of a bias may differ from the product of the other two: relative, absolute (1.28 and later)."""


def is_conversion(node: ir.Node | None, op_type: str = "") -> bool:
    """Return whether a node is a QuantizeLinear or DequantizeLinear (or the named one), of ONNX or of contrib."""
    kinds = (op_type,) if op_type else ("QuantizeLinear", "DequantizeLinear")
    return is_op(node, *kinds) or is_op(node, *kinds, domain="com.microsoft")


def dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that computes a value, if one does."""
    node = None if value is None else value.producer()
    return node if is_conversion(node, "DequantizeLinear") else None


@dataclass(frozen=True)
class Unit:
    """One operator among Q/DQ.

    Attributes:
        node: the operator.
        target: the table that stands for the engine.
        opset: of the model.
    """

    node: ir.Node
    target: Target
    opset: int

    @property
    def data(self) -> tuple[ir.Value, ...]:
        """Return the inputs that an integer kernel reads quantized, without the bias."""
        given = self.node.inputs
        op_type = self.node.op_type
        if op_type in ("Add", "Mul", "Concat"):
            chosen = tuple(given)
        elif op_type in _WEIGHTED:
            chosen = tuple(given[:2])
        else:
            chosen = tuple(given[1:3]) if op_type == "Where" else tuple(given[:1])
        return tuple(v for v in chosen if v is not None)

    @property
    def bias(self) -> ir.Value | None:
        """Return the bias of a Conv or Gemm."""
        has = self.node.op_type in ("Conv", "Gemm") and len(self.node.inputs) > 2
        return self.node.inputs[2] if has else None

    @property
    def end(self) -> ir.Node:
        """Return the node behind which the QuantizeLinear stands: the operator, or the activation behind it."""
        reader = single_consumer(self.node.outputs[0])
        if reader is not None and reader.op_type in _ACTIVATIONS and reader.inputs[0] is self.node.outputs[0]:
            return reader
        return self.node

    @property
    def quantizes(self) -> tuple[ir.Node, ...]:
        """Return the QuantizeLinear that read the result."""
        return tuple(n for n in consumers(self.end.outputs[0]) if is_conversion(n, "QuantizeLinear"))


def units(model: ir.Model, target: Target) -> list[Unit]:
    """Return every operator that stands between Q and DQ: it reads a DequantizeLinear or a QuantizeLinear reads it."""
    opset = model.graph.opset_imports.get("", model.opset_imports.get("", 0))
    found = []
    for node in model.graph.all_nodes():
        if is_conversion(node) or is_op(node, "Constant", "DynamicQuantizeLinear") or not node.outputs:
            continue
        unit = Unit(node, target, opset)
        reads = any(dequantize_of(v) is not None for v in node.inputs)
        written = any(is_conversion(n, "QuantizeLinear") for v in node.outputs for n in consumers(v))
        if reads or written:
            found.append(unit)
    # An activation that goes with the operator in front of it is no unit of its own.
    ends = {u.end for u in found if u.end is not u.node}
    return [u for u in found if u.node not in ends]


def causes_in_graph(unit: Unit) -> tuple[Cause, ...]:
    """Return what keeps an operator from its integer kernel, the decisive cause first."""
    found = []
    for check in _CHECKS:
        answer = check(unit)
        if answer is not None:
            found.append(cause(*answer, who="engine", where="given"))
    return tuple(found)


_Answer = tuple[str, str] | None


# ---- the operator ---------------------------------------------------------------------------------------------------


def _kernel(u: Unit) -> _Answer:
    node = u.node
    known = (*_NEEDS_OUTPUT, *_MOVERS, *_OTHERS, "MatMul", "Gemm")
    if node.domain in ("", "ai.onnx") and node.op_type in known:
        return None
    if node.op_type in _ACTIVATIONS:
        source = _behind_pair(node.inputs[0])
        if source is not None and source.op_type in (*_WEIGHTED, "Add"):
            return "misplaced", f"the Q/DQ pair stands between {source.name} ({source.op_type}) and {node.op_type}"
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is not None and before.op_type in (*_WEIGHTED, "Add"):
            return None  # it goes with that operator, which is a unit of its own
    return "no-integer-kernel", f"{u.target.engine} has no integer kernel for {node.op_type}"


def _behind_pair(value: ir.Value | None) -> ir.Node | None:
    dequantize = dequantize_of(value)
    quantize = None if dequantize is None or dequantize.inputs[0] is None else dequantize.inputs[0].producer()
    if quantize is None or not is_conversion(quantize, "QuantizeLinear") or quantize.inputs[0] is None:
        return None
    return quantize.inputs[0].producer()


def _sources(u: Unit) -> list[ir.Node]:
    return [d for v in u.data if (d := dequantize_of(v)) is not None]


def _float_type(u: Unit) -> _Answer:
    for node in (*_sources(u), *u.quantizes):
        scale = node.inputs[1]
        if scale is not None and scale.dtype not in (None, ir.DataType.FLOAT):
            return "not-float32", f"{node.name} has a {scale.dtype.name.lower()} scale; integer kernels need float32"
    return None


def _constants(u: Unit) -> _Answer:
    moves = u.node.op_type in _MOVERS
    for node in (*_sources(u), *u.quantizes):
        if not is_const(node.inputs[1]):
            return "scale-not-constant", f"the scale of {node.name} is computed at run time"
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not None and not is_const(zero):
            if moves:
                return "zero-point-not-constant", f"the zero point of {node.name} is computed at run time"
        elif zero is None and moves:
            return "zero-point-missing", f"{node.name} has no zero point written out"
        if attr_int(node, "block_size", 0):
            return "blocks", f"{node.name} dequantizes in blocks of {attr_int(node, 'block_size', 0)}"
    return None


def _not_all_inputs(u: Unit) -> _Answer:
    without = [v for v in u.data if dequantize_of(v) is None]
    if not without or (len(without) == len(u.data) == 1 and not u.quantizes):
        return None
    value = without[0]
    place = list(u.node.inputs).index(value)
    if is_const(value):
        if u.node.op_type in _WEIGHTED and place == 1:
            return "weight-not-quantized", f"the weight {value.name} is float"
        return "constant-not-quantized", f"input {place} ({value.name}) is a float constant"
    return "input-not-quantized", f"input {place} ({value.name}) does not come from a DequantizeLinear"


def _weight_computed(u: Unit) -> _Answer:
    if u.node.op_type not in ("Conv", "Gemm"):
        return None
    source = dequantize_of(u.data[1]) if len(u.data) > 1 else None
    if source is not None and not is_const(source.inputs[0]) and _root_is_run_time(source.inputs[0]):
        return "weight-not-constant", f"the weight {u.data[1].name} is computed at run time"
    return None


def _root_is_run_time(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if is_conversion(node, "QuantizeLinear"):
        assert node is not None
        return not is_const(node.inputs[0])
    return True


# ---- types and numbers ----------------------------------------------------------------------------------------------


def _stored(node: ir.Node) -> str:
    """Return the storage format of a Q or DQ, empty if unknown."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    value = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
    kind = zero.dtype if zero is not None and zero.dtype is not None else None if value is None else value.dtype
    found = format_of(kind)
    if found is None and node.op_type == "QuantizeLinear" and zero is None:
        return "uint8"
    return "" if found is None else found.name


def _types(u: Unit) -> _Answer:
    sources = _sources(u)
    stored = [_stored(n) for n in sources]
    results = [_stored(n) for n in u.quantizes]
    wide = next((s for s in (*stored, *results) if s and FORMATS[s].bits == 16), None)
    if wide is not None and (u.node.op_type not in _MOVERS or u.node.op_type in ("MaxPool", "Resize")):
        return "sixteen-bits", f"it is quantized to {wide}; the integer kernel of {u.node.op_type} has 8 bits"
    if u.node.op_type in _WEIGHTED and len(stored) == 2 and stored == ["int8", "uint8"]:
        return "weight-type", "an int8 input needs an int8 weight, found uint8"
    alike = stored if u.node.op_type in ("Add", "Mul", "Concat") else stored[:1]
    others = {s for s in (*alike, *results) if s}
    signed_pair = _signed_input(u) is not None
    if len(others) > 1 and not signed_pair and u.node.op_type not in _WEIGHTED:
        return "types-differ", f"its data is stored as {' and '.join(sorted(others))}; the kernel has one type"
    return None


def _signed_input(u: Unit) -> ir.Node | None:
    """Return the DequantizeLinear of a signed activation."""
    for value in u.data:
        source = dequantize_of(value)
        if source is not None and not is_const(source.inputs[0]) and _stored(source) == "int8":
            return source
    return None


def _signed(u: Unit) -> _Answer:
    """Signed activations on x86: the engine makes them unsigned only where one operator reads them."""
    if u.node.op_type in _MOVERS or u.target.activation != "uint8":
        return None
    source = _signed_input(u)
    stored = [] if source is None else [(source.inputs[0], "activation")]
    stored += [(q.outputs[0], "result") for q in u.quantizes if _stored(q) == "int8"]
    for integers, what in stored:
        readers = 0 if integers is None else _readers(integers)
        if integers is not None and readers > 1:
            return (
                "signed-activation",
                f"the signed {what} {integers.name} has {readers} readers; on x86 the engine makes it unsigned only "
                "for one",
            )
    return None


def _readers(integers: ir.Value) -> int:
    """Return how many operators read a stored value, directly or through DequantizeLinear."""
    return sum(
        len(consumers(n.outputs[0])) + n.outputs[0].is_graph_output() if is_conversion(n, "DequantizeLinear") else 1
        for n in consumers(integers)
    )


def _bias(u: Unit) -> _Answer:
    bias = u.bias
    if bias is None:
        return None
    source = dequantize_of(bias)
    if source is None:
        if u.quantizes and is_const(bias):
            return None  # the engine quantizes a constant bias itself where a QuantizeLinear follows
        return "float-bias", f"the bias {bias.name} is float, and the output is not quantized"
    if _stored(source) != "int32":
        return "bias-type", f"the bias is stored as {_stored(source) or 'an unknown type'}, expected int32"
    scales = [const_array(n.inputs[1]) for n in (*_sources(u), source)]
    if len(scales) != 3 or any(s is None for s in scales):
        return None
    x, w, b = (np.asarray(s, np.float64).reshape(-1) for s in scales)
    wanted = x * w
    relative, absolute = _BIAS_TOLERANCE
    if b.shape != wanted.shape and 1 not in (b.size, wanted.size):
        return "bias-scale", f"the bias has {b.size} scales, the weight {w.size}"
    if (np.abs(b - wanted) > relative * wanted + absolute).any():
        worst = int(np.argmax(np.abs(b - wanted) / wanted))
        found, expected = b[min(worst, b.size - 1)], wanted[min(worst, wanted.size - 1)]
        return "bias-scale", f"the bias has scale {found:.4g}, expected x_scale * w_scale = {expected:.4g}"
    return None


# ---- the result -----------------------------------------------------------------------------------------------------


def _output(u: Unit) -> _Answer:
    node, readers = u.node, consumers(u.node.outputs[0])
    if u.quantizes:
        return None
    if node.op_type == "MatMul" and len(readers) == 1 and is_op(readers[0], "Add"):
        other = next((v for v in readers[0].inputs if v is not node.outputs[0]), None)
        behind = any(is_conversion(n, "QuantizeLinear") for n in consumers(readers[0].outputs[0]))
        if is_const(other) and not behind:
            return "product-and-add", f"{readers[0].name} (Add) follows, and nothing quantizes its result"
        return None
    if node.op_type in (*_NEEDS_OUTPUT, *_MOVERS):
        return "no-output-quantize", f"no QuantizeLinear reads {u.end.outputs[0].name}"
    return None


def _shared_result(u: Unit) -> _Answer:
    read = {n for v in (u.node, u.end) for n in consumers(v.outputs[0]) if is_conversion(n, "QuantizeLinear")}
    if not read:
        return None
    for node in dict.fromkeys((u.node, u.end)):
        value = node.outputs[0]
        if value.is_graph_output():
            return "graph-output", f"{value.name}, in front of the QuantizeLinear, is a graph output"
        others = [n for n in consumers(value) if n is not u.end and n not in read]
        captured = [n for n in others if n.graph is not node.graph]
        if captured:
            return "captured", f"{value.name} is also read by {captured[0].name} in a body"
        if others:
            return "interior-used-elsewhere", f"{value.name} is also read by {others[0].name} ({others[0].op_type})"
    if len(u.quantizes) > 1 and len(u.node.outputs) == 1:
        return "two-quantizations", f"{len(u.quantizes)} QuantizeLinear read {u.end.outputs[0].name}"
    return None


def _activation(u: Unit) -> _Answer:
    end = u.end
    if end is u.node or not u.quantizes:
        return None
    quantize = u.quantizes[0]
    storage = FORMATS.get(_stored(quantize))
    scale = const_array(quantize.inputs[1])
    zero = const_array(quantize.inputs[2]) if len(quantize.inputs) > 2 else np.zeros((), np.int64)
    if storage is None or scale is None or zero is None or scale.size != 1:
        return None
    point, step = int(zero.reshape(-1)[0]), float(scale.reshape(-1)[0])
    if end.op_type == "Relu" and point != storage.qmin:
        return (
            "activation-not-redundant",
            f"Relu stands in front of a QuantizeLinear with zero point {point} ({storage.name}); only {storage.qmin} "
            "makes it redundant",
        )
    if end.op_type == "Clip":
        low, high = (storage.qmin - point) * step, (storage.qmax - point) * step
        ends = [const_array(v) if v is not None else None for v in (*end.inputs[1:], None, None)[:2]]
        least = -np.inf if ends[0] is None else float(ends[0].reshape(-1)[0])
        most = np.inf if ends[1] is None else float(ends[1].reshape(-1)[0])
        if low < least - 1e-6 or high > most + 1e-6:
            return (
                "activation-not-redundant",
                f"the quantized range [{low:.4g}, {high:.4g}] passes what Clip to [{least:.4g}, {most:.4g}] does not",
            )
    return None


def _movers(u: Unit) -> _Answer:
    node = u.node
    if node.op_type == "MaxPool":
        indices = node.outputs[1] if len(node.outputs) > 1 else None
        if indices is not None and (indices.uses() or indices.is_graph_output()):
            return "indices-used", "the indices output is read; the integer form has none"
        if u.opset < 12:
            return "opset", f"MaxPool takes integers from opset 12 on, the model has {u.opset}"
    if node.op_type == "Resize" and attr_str(node, "mode", "nearest") != "nearest":
        return "resize-mode", f"{attr_str(node, 'mode', 'nearest')} interpolation computes; only nearest moves integers"
    if node.op_type not in _MOVERS or not u.quantizes:
        return None
    source = dequantize_of(node.inputs[0])
    if source is None or is_const(source.inputs[0]):
        return None
    for quantize in u.quantizes:
        if not same_params(source, quantize):
            a, b = (_numbers(n) for n in (source, quantize))
            return "parameters-differ", f"{a} in front and {b} behind"
    return None


def _numbers(node: ir.Node) -> str:
    scale = const_array(node.inputs[1])
    zero = const_array(node.inputs[2]) if len(node.inputs) > 2 else None
    first = "an unknown scale" if scale is None else f"scale {float(scale.reshape(-1)[0]):.4g}"
    return f"{first}, zero point {0 if zero is None else int(zero.reshape(-1)[0])}"


def _attributes(u: Unit) -> _Answer:
    node = u.node
    if node.op_type == "AveragePool" and any(d != 1 for d in attr_ints(node, "dilations") or ()):
        return "dilations", "the integer kernel of AveragePool has no dilations"
    if node.op_type == "Gemm" and u.bias is not None:
        alpha, beta = attr_float(node, "alpha", 1.0), attr_float(node, "beta", 1.0)
        if (alpha, beta) != (1.0, 1.0):
            return "gemm-form", f"alpha is {alpha:g} and beta {beta:g}; with a bias both must be 1"
    return None


_CHECKS: tuple[Callable[[Unit], _Answer], ...] = (
    _kernel, _attributes, _float_type, _constants, _weight_computed, _not_all_inputs, _types, _movers, _shared_result,
    _output, _activation, _bias, _signed,
)  # fmt: skip
"""In this order: what no change of numbers could mend comes first."""

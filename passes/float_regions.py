"""Which nodes compute in float16 or bfloat16: what must stay in float32, and the cut with the fewest Casts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import networkx as nx
import numpy as np
import onnx_ir as ir
from onnx import defs

from qcompiler.engine import Array
from qcompiler.ir.graph import attr_int, const_array, consumers, is_const, is_op
from qcompiler.ir.schemas import schema_of
from qcompiler.passes.block_operators import MXFP8_DEQUANTIZE, TRT_DOMAIN
from qcompiler.quant.spec import RangeSource

HEAVY = frozenset(
    {"Conv", "ConvTranspose", "MatMul", "MatMulNBits", "Gemm", "Einsum", "LSTM", "GRU", "RNN", "Attention"}
)
"""Operators that a narrow type is for: they are worth any number of Casts."""
DELICATE: Mapping[str, str] = MappingProxyType(
    {
        "Exp": "its result grows beyond float16 from 11.1 on",
        "Pow": "it squares what may be large, or takes a root of what is small",
        "Log": "it turns the rounding of small numbers into large errors",
        "Reciprocal": "small numbers give results beyond float16",
        "ReduceSum": "a long sum in a narrow type loses its last terms",
        "ReduceMean": "a long sum in a narrow type loses its last terms",
        "ReduceSumSquare": "squares overflow float16 from 256 on",
        "ReduceL1": "a long sum in a narrow type loses its last terms",
        "ReduceL2": "squares overflow float16 from 256 on",
        "ReduceLogSum": "a long sum in a narrow type loses its last terms",
        "ReduceLogSumExp": "exponentials grow beyond float16 from 11.1 on",
        "ReduceProd": "a product leaves the range of float16 quickly",
        "CumSum": "a running sum in a narrow type loses its last terms",
        "Range": "it counts, and float16 counts to 2048",
        "Mod": "a remainder is of the size of the rounding",
        "LogSoftmax": "it holds a logarithm",
        "LpNormalization": "squares overflow float16 from 256 on",
        "InstanceNormalization": "its sums run over whole images",
        "GroupNormalization": "its sums run over whole images",
        "BatchNormalization": "its statistics are stored in float32",
        "GridSample": "a position in float16 is off by a pixel from 1024 on",
        "RoiAlign": "a position in float16 is off by a pixel from 1024 on",
        "NonMaxSuppression": "boxes in float16 are off by a pixel from 1024 on",
        "Sin": "its argument is an angle, often a position times a frequency",
        "Cos": "its argument is an angle, often a position times a frequency",
        "Tan": "its argument is an angle",
    }
)
"""Operators that stay in float32, and why."""
_TYPED_BY_ATTRIBUTE = frozenset(
    {
        "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
        "Bernoulli", "Multinomial", "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix",
    }
)  # fmt: skip
_BLIND = frozenset({"Shape", "Size", "IsNaN"})
"""Operators that read a value of any type to the same end."""
_DYNAMIC = ("TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize")
_BOUNDED = frozenset(
    {"Softmax", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Clip", "LayerNormalization", "Softsign", "Cast"}
)
"""Operators whose result fits whatever they read."""
_LARGE = frozenset({"constant-overflows", "too-large"})
_SHARE = 0.25
"""Share of the largest float16 number that a value may reach in calibration; a sum of four such values still fits."""
_LOST = 2.0**-9
"""Relative error of a constant from which it counts as lost: half of what 8-bit steps cost."""
_HALF_MAX = 65504.0
_MOST = _SHARE * _HALF_MAX
_WORTH = {True: 1000.0, False: 0.5}
"""What a heavy, or any other, node in the narrow type is worth, in Casts."""


@dataclass(frozen=True)
class Regions:
    """The choice for one graph.

    Attributes:
        narrow: nodes that compute in the narrow type.
        reasons: node to (reason code, sentence) for nodes that must stay in float32.
    """

    narrow: frozenset[ir.Node]
    reasons: dict[ir.Node, tuple[str, str]]


def is_quantizer(node: ir.Node | None) -> bool:
    """Return whether a node quantizes or dequantizes, TensorRT's own operators included."""
    return is_dequantizer(node) or is_op(node, "QuantizeLinear") or is_op(node, *_DYNAMIC, domain=TRT_DOMAIN)


def is_dequantizer(node: ir.Node | None) -> bool:
    """Return whether a node dequantizes."""
    return is_op(node, "DequantizeLinear") or is_op(node, MXFP8_DEQUANTIZE, domain=TRT_DOMAIN)


def find_regions(graph: ir.Graph, opset: int, narrow: ir.DataType, statistics: RangeSource | None) -> Regions:
    """Choose the nodes of one graph that compute in a narrow type; bodies of its nodes are graphs of their own.

    A minimum cut between what must stay wide and what is worth most narrow: each value that is read on the other side
    costs one Cast. QuantizeLinear takes the type that it is given and DequantizeLinear the one that is asked of it, so
    neither needs a Cast.

    Args:
        graph: a LOWERED graph.
        opset: its operator set.
        narrow: float16 or bfloat16.
        statistics: observed ranges, which say what fits into float16.
    """
    reasons: dict[ir.Node, tuple[str, str]] = {}
    free: list[ir.Node] = []
    large: set[ir.Value] = set()
    for node in graph:
        if is_quantizer(node) or is_op(node, *_BLIND) or not any(True for _ in _floats(node)):
            continue
        reason = _why_wide(node, opset, narrow, statistics, large)
        if reason is None:
            free.append(node)
            continue
        reasons[node] = reason
        if reason[0] in _LARGE and node.op_type not in _BOUNDED:
            large.update(v for v in node.outputs if _is_wide(v) and not _known_to_fit(v, statistics))
    return Regions(frozenset(_cut(graph, free, narrow)), reasons)


def follows(node: ir.Node, narrow: ir.DataType) -> bool:
    """Return whether a node reads a value in whatever type it has: Shape and its kind, and a QuantizeLinear."""
    return is_op(node, *_BLIND) or (is_quantizer(node) and not is_dequantizer(node) and scale_fits(node, narrow))


def narrow_positions(node: ir.Node, opset: int, narrow: ir.DataType) -> tuple[set[int], set[int]] | None:
    """Return (inputs, outputs) of a node whose type may become the narrow one, or None if the operator has none.

    By the operator's definition: all that share a type variable change together, and every float32 output must.
    """
    if is_op(node, "MatMulNBits", domain="com.microsoft"):
        # A, scales and bias have the type of the output; the packed weight and its zero points have their own.
        return {i for i in (0, 2, 5) if i < len(node.inputs) and node.inputs[i] is not None}, {0}
    schema = schema_of(node.op_type, opset) if node.domain in ("", "ai.onnx") else None
    if schema is None:
        return None
    wanted = f"tensor({narrow.name.lower()})"
    inputs = {i for i, v in enumerate(node.inputs) if _is_wide(v) and wanted in _types(schema.inputs, i)}
    outputs = {i for i, v in enumerate(node.outputs) if _is_wide(v) and wanted in _types(schema.outputs, i)}
    if any(_is_wide(v) and i not in outputs for i, v in enumerate(node.outputs)):
        return None
    variables = {_variable(schema.inputs, i) for i in inputs} | {_variable(schema.outputs, i) for i in outputs}
    if any(_is_wide(v) and i not in inputs and _variable(schema.inputs, i) in variables for i, v in _numbered(node)):
        return None
    return (inputs, outputs) if inputs or outputs else None


def _numbered(node: ir.Node) -> Iterator[tuple[int, ir.Value | None]]:
    yield from enumerate(node.inputs)


def _parameter(parameters: Sequence[defs.OpSchema.FormalParameter], index: int) -> defs.OpSchema.FormalParameter:
    return parameters[min(index, len(parameters) - 1)]


def _types(parameters: Sequence[defs.OpSchema.FormalParameter], index: int) -> set[str]:
    return set(_parameter(parameters, index).types)


def _variable(parameters: Sequence[defs.OpSchema.FormalParameter], index: int) -> str:
    return str(_parameter(parameters, index).type_str)


def _is_wide(value: ir.Value | None) -> bool:
    return value is not None and bool(value.name) and value.dtype is ir.DataType.FLOAT


def _floats(node: ir.Node) -> Iterator[ir.Value]:
    for value in (*node.inputs, *node.outputs):
        if value is not None and _is_wide(value):
            yield value


def _why_wide(
    node: ir.Node, opset: int, narrow: ir.DataType, statistics: RangeSource | None, large: set[ir.Value]
) -> tuple[str, str] | None:
    """Return (reason code, sentence) why a node must compute in float32, or None."""
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        return "holds-a-body", f"the values at the border of a body of {node.op_type} keep their types"
    if node.op_type in DELICATE:
        return "delicate", f"{node.op_type}: {DELICATE[node.op_type]}"
    if node.op_type in _TYPED_BY_ATTRIBUTE:
        return "type-in-attribute", f"{node.op_type} names its type in an attribute"
    if node.op_type == "LayerNormalization" and attr_int(node, "stash_type", 1) != 1:
        return "delicate", "LayerNormalization is asked to sum in the narrow type"
    if is_op(node, "Cast", "CastLike"):
        return _why_wide_cast(node)
    if any(v is None or v.type is None for v in node.outputs if v.name):
        return "type-unknown", "the type of a result is not known"
    if narrow_positions(node, opset, narrow) is None:
        return "no-such-type", f"{node.op_type} has no {narrow.name.lower()} form in opset {opset}"
    for value in _floats(node):
        if value in large:
            return "too-large", f"{value.name} is computed from a number beyond {narrow.name.lower()}"
        reason = _unfit(value, narrow, statistics)
        if reason is not None:
            return reason
    return None


def _known_to_fit(value: ir.Value, statistics: RangeSource | None) -> bool:
    return statistics is not None and statistics.observed(str(value.name)) and _reach(value, statistics) <= _MOST


def _reach(value: ir.Value, statistics: RangeSource) -> float:
    low, high = statistics.range(str(value.name))
    return max(-low, high)


def _why_wide_cast(node: ir.Node) -> tuple[str, str] | None:
    source = node.inputs[0]
    if is_op(node, "CastLike"):
        return "type-in-attribute", "CastLike takes its type from another value"
    if not _is_wide(source):
        return "from-integers", "integers above 2048 are not exact in float16"
    return None


def _unfit(value: ir.Value, narrow: ir.DataType, statistics: RangeSource | None) -> tuple[str, str] | None:
    """Return why a value does not fit into the narrow type, or None."""
    array = const_array(value)
    if array is not None:
        return lossy(array, narrow)
    producer = value.producer()
    if producer is not None and is_dequantizer(producer):
        if scale_fits(producer, narrow):
            return None
        return "scale-lost", f"a scale of {producer.name} has too few digits in float16"
    if narrow is not ir.DataType.FLOAT16 or statistics is None or not statistics.observed(str(value.name)):
        return None
    reach = _reach(value, statistics)
    if reach > _MOST:
        return "too-large", f"{value.name} reaches {reach:.4g} in calibration; float16 ends at {_HALF_MAX:g}"
    return None


def narrowed(array: Array, narrow: ir.DataType) -> Array:
    """Return an array rounded to the narrow type."""
    with np.errstate(over="ignore"):
        return array.astype(narrow.numpy())


def lossy(array: Array, narrow: ir.DataType) -> tuple[str, str] | None:
    """Return (reason code, sentence) if a constant overflows or loses itself in the narrow type, else None."""
    finite = np.isfinite(array)
    wide = np.where(finite, array, 0.0).astype(np.float64)
    made = np.where(finite, narrowed(array, narrow).astype(np.float64), 0.0)
    if not np.isfinite(made).all():
        return "constant-overflows", f"a constant reaches {np.abs(wide).max():.4g}, beyond {narrow.name.lower()}"
    norm = float(np.sqrt(np.sum(wide**2)))
    error = float(np.sqrt(np.sum((wide - made) ** 2)))
    if error > _LOST * norm and narrow is ir.DataType.FLOAT16:
        return "constant-lost", f"a constant of norm {norm:.3g} is off by {error:.3g} in float16"
    return None


def scale_fits(node: ir.Node, narrow: ir.DataType) -> bool:
    """Return whether the scales of a Q or DQ keep what they stand for in the narrow type.

    Judged by the numbers that the scales multiply, where those are constant: a channel that is tiny beside the others
    vanishes in the steps of the quantized result, so its scale may lose digits.
    """
    if node.domain == TRT_DOMAIN and node.op_type != "TRT_FP4DynamicQuantize":
        return True  # its scales are exponents
    scale = const_array(node.inputs[1])
    if scale is None:
        inner = node.inputs[1].producer() if node.inputs[1] is not None else None
        return is_op(inner, "DequantizeLinear") and inner is not None and scale_fits(inner, narrow)
    if narrow is not ir.DataType.FLOAT16:
        return True
    wide = scale.astype(np.float64)
    made = narrow_scale(node, narrow).astype(np.float64)
    if not np.isfinite(made).all():
        return False
    weight = _norms(node)
    if weight is None:
        return not bool((np.abs(made - wide) > _LOST * wide).any())
    total = float(np.sqrt(np.sum((wide * weight) ** 2)))
    return float(np.sqrt(np.sum(((made - wide) * weight) ** 2))) <= _LOST * total


def narrow_scale(node: ir.Node, narrow: ir.DataType) -> Array:
    """Return the scales of a Q or DQ in the narrow type, none of them 0.

    A scale that multiplies nothing but zeros becomes 1, one that is too small the least positive number.
    """
    scale, weight = const_array(node.inputs[1]), _norms(node)
    assert scale is not None
    used = scale if weight is None else np.where(weight > 0, scale, np.float32(1.0))
    least = 2.0**-24 if narrow is ir.DataType.FLOAT16 else 0.0
    return narrowed(np.asarray(np.maximum(used, least), scale.dtype), narrow)


def _norms(node: ir.Node) -> Array | None:
    """Return the norm of the constant numbers that each scale multiplies, in the scale's shape; None if unknown."""
    scale, stored = const_array(node.inputs[1]), const_array(node.inputs[0])
    if scale is None or stored is None or attr_int(node, "block_size", 0) or not is_op(node, "DequantizeLinear"):
        return None
    numbers = stored.astype(np.float64)
    if scale.ndim == 1 and scale.size > 1:
        axis = attr_int(node, "axis", 1) % stored.ndim
        rest = tuple(i for i in range(stored.ndim) if i != axis)
        return np.asarray(np.sqrt(np.sum(numbers**2, axis=rest)))
    return np.asarray(np.sqrt(np.sum(numbers**2))).reshape(scale.shape)


# ---- the cut --------------------------------------------------------------------------------------------------------


def _cut(graph: ir.Graph, free: list[ir.Node], narrow_type: ir.DataType) -> set[ir.Node]:
    """Return the free nodes on the narrow side of a minimum cut."""
    if not free:
        return set()
    flow: nx.DiGraph[object] = nx.DiGraph()
    inside = set(free)
    source, sink = "narrow", "wide"
    for node in free:
        flow.add_edge(source, node, capacity=_WORTH[node.op_type in HEAVY])
    # Also what a body captures from outside.
    for value in dict.fromkeys(v for node in graph for v in (*node.inputs, *node.outputs) if v is not None):
        if _is_wide(value) and not is_const(value) and not is_dequantizer(value.producer()):
            _add_value(flow, value, inside, sink, graph, narrow_type)
    if sink not in flow:
        return inside
    _, (narrow, _) = nx.minimum_cut(flow, source, sink, capacity="capacity")
    return {node for node in narrow if isinstance(node, ir.Node)}


def _add_value(
    flow: nx.DiGraph[object],
    value: ir.Value,
    inside: set[ir.Node],
    sink: str,
    graph: ir.Graph,
    narrow: ir.DataType,
) -> None:
    """Charge one Cast where a value's producer and any of its readers are on different sides."""
    producer = value.producer()
    made: object = producer if producer in inside else sink
    readers: list[object] = []
    for node in consumers(value):
        if not follows(node, narrow):
            readers.append(node if node in inside and node.graph is graph else sink)
    if value.is_graph_output():
        readers.append(sink)
    readers = list(dict.fromkeys(readers))
    if not readers or (made is sink and readers == [sink]):
        return
    down, up = ("down", value), ("up", value)
    if made is not sink:
        flow.add_edge(made, down, capacity=1.0)
        for reader in readers:
            flow.add_edge(down, reader)
    for reader in readers:
        if reader is not sink:
            flow.add_edge(reader, up)
    flow.add_edge(up, made, capacity=1.0)

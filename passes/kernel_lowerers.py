"""Calls of the ``qcompiler`` domain as kernels: one function per kind of root; each says why it could not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, consumers, is_op, rank_of
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.activation_products import find_product
from qcompiler.passes.conv_geometry import conv_geometry
from qcompiler.passes.float_convs import inserted
from qcompiler.passes.integer_operators import Emission
from qcompiler.passes.kernel_nodes import FLOAT_LIMIT, KERNEL_DOMAIN, kernel_node, scalar_params, stand_in, stored
from qcompiler.passes.lookup_tables import FUNCTIONS, all_reals
from qcompiler.patterns.operators import attribute_value

_INT8 = ir.DataType.INT8
_FLOAT8 = ir.DataType.FLOAT8E4M3FN
_FLOATS = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_BLOCKS = (16, 32, 64, 128, 256)

Lowerer = Callable[[Emission], str | None]


def _finish(e: Emission, kernel: str, arguments: Mapping[str, ir.Value | None], settings: Mapping[str, Any]) -> None:
    """Insert a kernel in place of the call."""
    name = e.call.name or kernel
    made = kernel_node(e.rewriter, kernel, arguments, settings, before=e.call, origin=[e.call], name=f"{name}:node")
    stand_in(e.rewriter, e.call, made)


def _bounds(e: Emission) -> dict[str, Any] | None:
    """Return the settings of the Relu or Clip inside a call, in real units, or None if its bounds are not constant."""
    node = next((n for n in e.function if is_op(n, "Relu", "Clip")), None)
    if node is None:
        return {}
    if node.op_type == "Relu":
        return {"activation": "relu"}
    bounds = [-FLOAT_LIMIT, FLOAT_LIMIT]
    for index, value in enumerate(e.outer(node.inputs[1:3])):
        if value is None:
            continue
        array = const_array(value)
        if array is None:
            return None
        bounds[index] = float(np.clip(np.float64(array.reshape(())), -FLOAT_LIMIT, FLOAT_LIMIT))
    return {"activation": "clip", "low": bounds[0], "high": bounds[1]}


def _weighted(e: Emission) -> tuple[dict[str, ir.Value | None], dict[str, Any]] | str:
    """Return arguments and settings that Conv and products have in common, or why there is no kernel."""
    weight, scales, zeros = (const_array(e.get(r)) for r in ("w", "ws", "wz"))
    if weight is None or scales is None:
        return "the weight is not a constant"
    if zeros is not None and np.any(zeros.astype(np.float32)):
        return "the weight has a zero point"
    kind = e.roles["w"].dtype
    if kind not in (_INT8, _FLOAT8) or e.roles["x"].dtype is not kind:
        return f"activations of {e.roles['x'].dtype} and weights of {kind} have no kernel"
    if scalar_params(e.get("xs"), e.get("xz")) is None:
        return "the activation's scale is not one constant"
    settings = _bounds(e)
    if settings is None:
        return "the bounds of Clip are not constants"
    if "b" in e.roles and const_array(e.roles["b"]) is None:
        return "the bias is not a constant"
    roles = ("x", "xs", "xz", "w", "ws", "b", "bs", "ys", "yz")
    if "ys" in e.roles and scalar_params(e.get("ys"), e.get("yz")) is None:
        return "the output's scale is not one constant"
    settings["out"] = "float32" if "ys" not in e.roles else "int8" if kind is _INT8 else "float8e4m3fn"
    return {r: e.get(r) for r in roles}, settings


def _conv(e: Emission) -> str | None:
    if "xs" not in e.roles:
        return "only the weight is quantized"
    found = _weighted(e)
    if isinstance(found, str):
        return found
    arguments, settings = found
    rank = rank_of(e.roles["w"])
    if rank not in (3, 4) or e.roles["w"].dtype is not _INT8:
        return f"convolutions of {(rank or 2) - 2} dimensions in {e.roles['w'].dtype} have no kernel"
    spatial = rank - 2
    geometry = conv_geometry(e.root, e.roles["x"], e.roles["w"], spatial)
    if geometry is None:
        return "auto_pad is left, and the data's lengths are not known"
    settings |= geometry
    if spatial == 2:
        _finish(e, "int8_conv", arguments, settings)
    else:
        _line_conv(e, arguments, settings)
    return None


def _line_conv(e: Emission, arguments: dict[str, ir.Value | None], settings: Mapping[str, Any]) -> None:
    """Convolve in one dimension as in two, the first of length 1."""
    weight, group = const_array(e.roles["w"]), e.call.name or "Conv"
    assert weight is not None
    axis = e.rewriter.constant(np.asarray([2], np.int64), f"{group}:axis")
    x = e.roles["x"]
    plane = e.rewriter.node("Unsqueeze", [x, axis], before=e.call, origin=[e.call], name=f"{group}/Unsqueeze").outputs[
        0
    ]
    e.rewriter.declare(plane, x.dtype, inserted(x.shape))
    arguments |= {"x": plane, "w": e.rewriter.constant(np.expand_dims(weight, 2), f"{group}:w")}
    made = kernel_node(
        e.rewriter, "int8_conv", arguments, settings, before=e.call, origin=[e.call], name=f"{group}:node"
    )
    e.rewriter.declare(made.outputs[0], _INT8, inserted(e.call.outputs[0].shape))
    back = e.rewriter.node("Squeeze", [made.outputs[0], axis], before=e.call, origin=[e.call], name=f"{group}/Squeeze")
    e.call.name = e.rewriter.unique(f"{group}:was")
    made.name = group
    e.rewriter.take_over(e.call.outputs[0], back.outputs[0])
    e.rewriter.replace(e.call.outputs[0], back.outputs[0])
    e.rewriter.erase(e.call)


def _product(e: Emission) -> str | None:
    if "xs" not in e.roles:
        return _stored_product(e)
    if e.root.op_type == "Gemm":
        plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
        if any(attribute_value(e.root, k, 21) != v for k, v in plain.items()):
            return "alpha, beta or a transposition is left"
    quantize = e.roles["xs"].producer()
    if is_op(quantize, "DynamicQuantizeLinear"):
        return _dynamic_product(e)
    if const_array(e.roles["w"]) is None:
        return _product_of_activations(e)
    found = _weighted(e)
    if isinstance(found, str):
        return found
    arguments, settings = found
    if rank_of(e.roles["w"]) != 2:
        return "the weight is not a matrix"
    _finish(e, "int8_matmul" if e.roles["w"].dtype is _INT8 else "fp8_matmul", arguments, settings)
    return None


def _product_of_activations(e: Emission) -> str | None:
    arguments, settings = find_product(e), _bounds(e)
    if isinstance(arguments, str):
        return arguments
    if settings is None:
        return "the bounds of Clip are not constants"
    _finish(e, "int8_matmul", arguments, settings | {"out": "int8" if "ys" in e.roles else "float32"})
    return None


def _dynamic_product(e: Emission) -> str | None:
    """Lower a product whose activation is quantized at run time: uint8 less 128, by a step of its own."""
    weight, scales, zeros = (const_array(e.get(r)) for r in ("w", "ws", "wz"))
    if weight is None or scales is None or weight.dtype != np.int8 or (zeros is not None and np.any(zeros)):
        return "the weight is not a constant of int8 without a zero point"
    if e.quantized_output or e.activation or "bs" in e.roles:
        return "a product with dynamic scales writes floats"
    quantize = e.roles["xs"].producer()
    assert quantize is not None
    signed = _signed_quantize(e.rewriter, quantize)
    arguments: dict[str, ir.Value | None] = {
        "x": signed.outputs[0], "a_scale_one": signed.outputs[1], "a_zero_one": signed.outputs[2],
        "w": e.roles["w"], "ws": e.roles["ws"], "b": e.get("b"),
    }  # fmt: skip
    _finish(e, "int8_matmul", arguments, {"out": "float32"})
    return None


def _signed_quantize(rewriter: Rewriter, quantize: ir.Node) -> ir.Node:
    """Return the step that quantizes the same value at run time to int8: DynamicQuantizeLinear, less 128."""
    source = quantize.inputs[0]
    assert source is not None
    for node in consumers(source):
        if node.domain == KERNEL_DOMAIN and node.op_type == "dynamic_quantize":
            return node
    made = kernel_node(
        rewriter, "dynamic_quantize", {"x": source}, {"scale": "token", "zeros": "token", "out": "int8"},
        before=quantize, origin=[quantize],
        name=f"{quantize.name}:int8", outputs=3,
    )  # fmt: skip
    rewriter.declare(made.outputs[0], _INT8, source.shape)
    rewriter.declare(made.outputs[1], ir.DataType.FLOAT, ir.Shape(()))
    rewriter.declare(made.outputs[2], ir.DataType.INT32, ir.Shape(()))
    return made


def _stored_product(e: Emission) -> str | None:
    """Lower a product with a weight that alone is stored in integers, in blocks along K."""
    weight, scales = (const_array(e.get(r)) for r in ("w", "ws"))
    if weight is None or scales is None or weight.ndim != 2 or e.quantized_output or e.activation:
        return "only products of floats with a constant matrix have a kernel"
    if e.roles["w"].dtype not in (ir.DataType.INT4, ir.DataType.UINT4, _INT8, ir.DataType.UINT8):
        return f"a weight of {e.roles['w'].dtype} has no kernel"
    block, axis = attr_int(e.dequantize("w"), "block_size", 0), attr_int(e.dequantize("w"), "axis", 1)
    if block not in _BLOCKS or axis % 2 != 0 or weight.shape[0] % block:
        return f"the scales are not in blocks of {', '.join(map(str, _BLOCKS))} along K"
    bias = const_array(e.roles.get("b"))
    if "b" in e.roles and (bias is None or bias.size != weight.shape[1]):
        return "the bias is not one constant per column"
    out = _FLOATS.get(e.call.outputs[0].dtype or ir.DataType.UNDEFINED)
    if out is None or e.roles["x"].dtype not in _FLOATS:
        return "the activations are not floats of 16 or 32 bits"
    bits = 4 if e.weight_bits == 4 or e.roles["w"].dtype in (ir.DataType.INT4, ir.DataType.UINT4) else 8
    arguments = {"x": e.roles["x"], "w": e.roles["w"], "ws": e.roles["ws"], "wz": e.get("wz"), "b": e.get("b")}
    _finish(e, "block_matmul", arguments, {"block": block, "bits": bits, "out": out})
    return None


def _pointwise(e: Emission) -> str | None:
    settings = _bounds(e)
    if settings is None:
        return "the bounds of Clip are not constants"
    if any(scalar_params(e.get(r + "s"), e.get(r + "z")) is None for r in "xwy"):
        return "a scale is not one constant"
    if any(e.roles[r].dtype is not _INT8 for r in "xw"):
        return "an operand is not int8"
    names = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz")
    if e.root.op_type == "Add" and reads_second(e.function, e.root):
        names = ("w", "ws", "wz", "x", "xs", "xz", "ys", "yz")
    arguments = {
        key: e.get(role) for key, role in zip(("x", "xs", "xz", "w", "ws", "wz", "ys", "yz"), names, strict=True)
    }
    _finish(e, f"int8_{e.root.op_type.lower()}", arguments, settings)
    return None


def _concat(e: Emission) -> str | None:
    """Copy bytes; parts with parameters of their own go through a table first."""
    out = scalar_params(e.get("ys"), e.get("yz"))
    parts = [e.roles[f"part.{i}.x"] for i in range(len(e.root.inputs))]
    params = [scalar_params(e.get(f"part.{i}.xs"), e.get(f"part.{i}.xz")) for i in range(len(parts))]
    if out is None or any(p is None for p in params) or any(v.dtype is not _INT8 for v in parts):
        return "a scale is not one constant, or a part is not int8"
    ready: list[ir.Value | None] = []
    for index, (part, own) in enumerate(zip(parts, params, strict=True)):
        assert own is not None
        if own == out:
            ready.append(part)
            continue
        # The reals in float32 and one division: what engines do, and ties fall as they do there.
        reals = ((np.arange(-128, 128) - own[1]).astype(np.float32) * own[0]) / out[0]
        table = np.clip(np.rint(reals).astype(np.float64) + out[1], -128, 127).astype(np.int8)
        ready.append(_lookup(e.rewriter, part, table, e.call, f"{e.call.name}:part{index}"))
    made = e.emit("Concat", ready, "", {"axis": e.root.attributes["axis"]})
    e.rewriter.replace(e.call.outputs[0], made[0])
    e.rewriter.erase(e.call)
    return None


def _lookup(rewriter: Rewriter, value: ir.Value, table: Any, before: ir.Node, name: str) -> ir.Value:
    """Insert a table of 256 entries, by stored number + 128."""
    constant = rewriter.constant(table, f"{name}:table")
    made = kernel_node(
        rewriter,
        "int8_lookup",
        {"x": value, "table": constant},
        {},
        before=before,
        origin=[before],
        name=f"{name}:lookup",
    )
    rewriter.declare(made.outputs[0], _INT8, value.shape)
    return made.outputs[0]


def _unary(e: Emission) -> str | None:
    own, out = scalar_params(e.get("xs"), e.get("xz")), scalar_params(e.get("ys"), e.get("yz"))
    if own is None or out is None or e.roles["x"].dtype is not _INT8:
        return "a scale is not one constant, or the data is not int8"
    kind = e.root.op_type
    if kind in ("AveragePool", "GlobalAveragePool"):
        keep = ("kernel_shape", "strides", "pads", "dilations", "auto_pad", "ceil_mode", "count_include_pad")
        geometry = {k: a.value for k, a in e.root.attributes.items() if k in keep}
        names = ("x", "xs", "xz", "ys", "yz")
        op = "average" if kind == "AveragePool" else "global_average"
        _finish(e, "int8_pool", {n: e.get(n) for n in names}, {"op": op, "layout": "NCHW", **geometry})
        return None
    if kind not in FUNCTIONS:
        return f"{kind} has no table"
    attributes = {k: a.value for k, a in e.root.attributes.items()}
    table = stored(FUNCTIONS[kind](all_reals(*own), attributes), *out)
    _finish(e, "int8_lookup", {"x": e.roles["x"], "table": e.rewriter.constant(table, f"{e.call.name}:table")}, {})
    return None


def _move(e: Emission) -> str | None:
    same = e.get("xs") is e.get("ys") and e.get("xz") is e.get("yz")
    if not same and scalar_params(e.get("xs"), e.get("xz")) != scalar_params(e.get("ys"), e.get("yz")):
        return "parameters differ"
    attributes = {a.name: a for a in e.root.attributes.values()}
    made = e.emit(e.root.op_type, [e.get("x"), *e.outer(e.root.inputs[1:])], "", attributes)
    for old, new in zip(e.call.outputs, made, strict=True):
        e.rewriter.replace(old, new)
    e.rewriter.erase(e.call)
    return None


def reads_second(function: ir.Function, root: ir.Node) -> bool:
    """Return whether the root's first input is not that of role x (patterns match sums both ways)."""
    roles = dict(pair.split("=") for pair in function.metadata_props["qcompiler.roles"].split(","))
    value = root.inputs[0]
    first = None if value is None else value.producer()
    return first is None or first.inputs[0] is not function.inputs[int(roles["x"])]


_MOVERS = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
    "SpaceToDepth", "MaxPool", "Resize",
)  # fmt: skip

LOWERERS: Mapping[str, Lowerer] = {
    "Conv": _conv, "MatMul": _product, "Gemm": _product, "Add": _pointwise, "Mul": _pointwise, "Concat": _concat,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"), _unary),
    **dict.fromkeys(_MOVERS, _move),
}  # fmt: skip
"""How calls are lowered, by their root's operator; all others are written out."""

"""NVFP4 and MXFP8 as TensorRT has them: its own operators in the place of block quantization in standard ones.

``trt::TRT_FP4DynamicQuantize(x, outer) -> (float4e2m1, float8e4m3fn scales)``, read by two DequantizeLinear; and
``trt::TRT_MXFP8DynamicQuantize(x) -> (float8e4m3fn, uint8 exponents)``, read by ``trt::TRT_MXFP8DequantizeLinear``.
Blocks lie along the last axis of activations, along K of weights.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import all_graphs, attr_int, const_array, is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.stored_constants import FLOAT4_STEPS, float4_of
from qcompiler.patterns.block_dynamic import BLOCK_DOMAIN, BLOCK_SIZES

TRT_DOMAIN = "trt"
MXFP8_DEQUANTIZE = "TRT_MXFP8DequantizeLinear"
_BIAS_E8M0 = 127


def write_block_operators(rewriter: Rewriter) -> int:
    """Replace the calls of `BLOCK_DOMAIN` and the weights beside them by TensorRT's operators.

    Returns:
        the number of calls replaced.
    """
    model, count = rewriter.model, 0
    for graph in all_graphs(model):
        for node in list(graph):
            if node.domain != BLOCK_DOMAIN:
                continue
            readers = [use.node for use in node.outputs[0].uses()]
            write = _write_nvfp4 if node.op_type == "QuantizeNVFP4" else _write_mxfp8
            write(rewriter, node)
            for reader in readers:
                weight = (
                    reader.inputs[1].producer() if len(reader.inputs) > 1 and reader.inputs[1] is not None else None
                )
                if is_op(weight, "DequantizeLinear") and weight is not None and attr_int(weight, "block_size", 0):
                    (_store_nvfp4 if node.op_type == "QuantizeNVFP4" else _store_mxfp8)(rewriter, weight)
            count += 1
    if count:
        for graph in all_graphs(model):
            graph.opset_imports.pop(BLOCK_DOMAIN, None)
        model.graph.opset_imports[TRT_DOMAIN] = 1
        for identifier in [i for i, f in model.functions.items() if f.domain == BLOCK_DOMAIN]:
            del model.functions[identifier]
    return count


def two_blocks(rewriter: Rewriter, node: ir.Node) -> bool:
    """Cut the blocks of an int4 weight in two where one spans all of K, each half with the scale of the whole.

    The numbers are the same; with a single block TensorRT decodes the weight in a kernel of its own (seen on TensorRT
    for RTX 1.7.1), as it does with one scale per channel.

    Returns:
        whether the node was such a DequantizeLinear.
    """
    stored, size = node.inputs[0], attr_int(node, "block_size", 0)
    if stored is None or stored.dtype is not ir.DataType.INT4 or size < 32 or size % 2 or len(node.inputs) < 2:
        return False
    scale, shape = const_array(node.inputs[1]), stored.shape
    axis = attr_int(node, "axis", 1)
    if scale is None or shape is None or shape[axis] != size:
        return False
    node.attributes["block_size"] = ir.AttrInt64("block_size", size // 2)
    for index, value in enumerate(node.inputs):
        numbers = const_array(value)
        if index and value is not None and numbers is not None:
            twice = ir.Tensor(np.repeat(numbers, 2, axis=axis), dtype=value.dtype, name=str(value.name))
            rewriter.set_input(node, index, rewriter.constant(twice, f"{value.name}:twice", node.graph))
            _forget(value)
    return True


def _write_nvfp4(rewriter: Rewriter, call: ir.Node) -> None:
    x, outer = call.inputs
    assert x is not None
    size = BLOCK_SIZES["QuantizeNVFP4"]
    made = rewriter.node(
        "TRT_FP4DynamicQuantize", [x, outer], before=call, origin=[call], domain=TRT_DOMAIN, outputs=2,
        name=str(call.name),
        attributes={"axis": -1, "block_size": size, "scale_type": int(ir.DataType.FLOAT8E4M3FN)},
    )  # fmt: skip
    rewriter.declare(made.outputs[0], ir.DataType.FLOAT4E2M1, x.shape)
    rewriter.declare(made.outputs[1], ir.DataType.FLOAT8E4M3FN, _per_block(x.shape, size))
    scale = rewriter.node(
        "DequantizeLinear", [made.outputs[1], outer], before=call, origin=[call], name=f"{call.name}/scale"
    ).outputs[0]
    rewriter.declare(scale, ir.DataType.FLOAT, made.outputs[1].shape)
    y = rewriter.node(
        "DequantizeLinear", [made.outputs[0], scale], before=call, origin=[call], name=f"{call.name}/DequantizeLinear",
        attributes={"axis": -1, "block_size": size},
    ).outputs[0]  # fmt: skip
    _take_place(rewriter, call, y)


def _write_mxfp8(rewriter: Rewriter, call: ir.Node) -> None:
    x = call.inputs[0]
    assert x is not None
    size = BLOCK_SIZES["QuantizeMXFP8"]
    made = rewriter.node(
        "TRT_MXFP8DynamicQuantize", [x], before=call, origin=[call], domain=TRT_DOMAIN, outputs=2, name=str(call.name),
        attributes={"axis": -1, "block_size": size, "output_dtype": int(ir.DataType.FLOAT8E4M3FN)},
    )  # fmt: skip
    rewriter.declare(made.outputs[0], ir.DataType.FLOAT8E4M3FN, x.shape)
    rewriter.declare(made.outputs[1], ir.DataType.UINT8, _per_block(x.shape, size))
    y = _mxfp8_dequantize(rewriter, made.outputs[0], made.outputs[1], -1, size, call)
    _take_place(rewriter, call, y)


def _mxfp8_dequantize(
    rewriter: Rewriter, stored: ir.Value, exponents: ir.Value, axis: int, size: int, place: ir.Node
) -> ir.Value:
    made = rewriter.node(
        MXFP8_DEQUANTIZE, [stored, exponents], before=place, origin=[place], domain=TRT_DOMAIN,
        name=f"{place.name}/DequantizeLinear",
        attributes={"axis": axis, "block_size": size, "output_dtype": int(ir.DataType.FLOAT)},
    ).outputs[0]  # fmt: skip
    rewriter.declare(made, ir.DataType.FLOAT, stored.shape)
    return made


def _store_nvfp4(rewriter: Rewriter, node: ir.Node) -> None:
    """Turn a weight that int8 carries back into float4e2m1."""
    carried = const_array(node.inputs[0])
    inner = node.inputs[1].producer() if node.inputs[1] is not None else None
    if carried is None or carried.dtype != np.int8 or inner is None or not is_op(inner, "DequantizeLinear"):
        return
    outer = const_array(inner.inputs[1])
    assert outer is not None
    old, old_outer = node.inputs[0], inner.inputs[1]
    assert old is not None
    assert old_outer is not None
    tensor = ir.Tensor(float4_of(carried), dtype=ir.DataType.FLOAT4E2M1, name=f"{old.name}:float4")
    rewriter.set_input(node, 0, rewriter.constant(tensor, f"{old.name}:float4", node.graph))
    if len(node.inputs) > 2:
        node.resize_inputs(2)
    wide = rewriter.constant(np.asarray(outer * np.float32(FLOAT4_STEPS), np.float32), f"{old_outer.name}:float4")
    rewriter.set_input(inner, 1, wide)
    _forget(old, old_outer)


def _store_mxfp8(rewriter: Rewriter, node: ir.Node) -> None:
    """Store the scales of a weight, powers of two, as the exponents that TensorRT reads."""
    scale, stored = const_array(node.inputs[1]), node.inputs[0]
    if scale is None or stored is None or stored.dtype is not ir.DataType.FLOAT8E4M3FN:
        return
    old = node.inputs[1]
    assert old is not None
    exponents = np.clip(np.rint(np.log2(scale.astype(np.float64))) + _BIAS_E8M0, 0, 254).astype(np.uint8)
    numbers = rewriter.constant(exponents, f"{old.name}:exponents", node.graph)
    axis, size = attr_int(node, "axis", 1), attr_int(node, "block_size", 0)
    y = _mxfp8_dequantize(rewriter, stored, numbers, axis, size, node)
    _take_place(rewriter, node, y)
    _forget(old)


def _take_place(rewriter: Rewriter, node: ir.Node, value: ir.Value) -> None:
    old = node.outputs[0]
    rewriter.take_over(old, value)
    rewriter.declare(value, old.dtype or ir.DataType.FLOAT, old.shape)
    rewriter.replace(old, value)
    rewriter.erase(node)


def _per_block(shape: ir.Shape | None, size: int) -> ir.Shape | None:
    if shape is None:
        return None
    dims = list(shape)
    last = dims[-1]
    return ir.Shape([*dims[:-1], last // size if isinstance(last, int) else None])


def _forget(*constants: ir.Value) -> None:
    """Remove constants that nothing reads any more."""
    for value in constants:
        graph = value.graph
        if not value.uses() and value.is_initializer() and graph is not None and not value.is_graph_output():
            del graph.initializers[str(value.name)]

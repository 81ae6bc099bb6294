"""Constants as the plan stores them: quantized weights and biases, each read through a DequantizeLinear.

A float4e2m1 weight is carried as int8 that holds twice its numbers (all of 0, 0.5 ... 6 are halves), under half its
scale: the same numbers in an opset and in operators that every engine has, so that builds can be compared with float.
The lowering of a target that has the type turns it back (`float4_of`). For the same reason 2-bit integers are carried
as 4-bit ones, below the opset that has them. What is meant stands in the point of the plan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qcompiler.engine import Array
from qcompiler.ir.graph import const_array, origins
from qcompiler.ir.rewriter import Rewriter
from qcompiler.pipeline.state import CompileState
from qcompiler.quant.arithmetic import bias_scale, fit_bias, quantize, quantize_bias, weight_params
from qcompiler.quant.formats import FORMATS
from qcompiler.quant.plan import use_point
from qcompiler.quant.saturation import pair_safe_params
from qcompiler.quant.spec import QuantParams, QuantSpec, fixed_params
from qcompiler.targets.groups import Group

FLOAT4 = "float4e2m1"
INT2_OPSET = 25
FLOAT4_STEPS = 2
"""Steps per unit of the grid that carries float4e2m1 numbers in int8."""


def float4_of(carried: Array) -> Array:
    """Return the float4e2m1 numbers (as ml_dtypes) that an int8 weight carries."""
    return (carried.astype(np.float32) / FLOAT4_STEPS).astype(FORMATS[FLOAT4].dtype)


def own_params(weight: Array, spec: QuantSpec, op_type: str) -> QuantParams:
    """Return the parameters of a weight by its own numbers, for the operator that reads it."""
    return pair_safe_params(weight, spec, op_type) if spec.pair_safe else weight_params(weight, spec)


class StoredConstants:
    """Store the constants of groups quantized, each one once, and let the groups read them."""

    def __init__(self, state: CompileState, rewriter: Rewriter, activation: Callable[[str], QuantParams]) -> None:
        """Take the state, its rewriter, and what finds the numbers of an activation point."""
        self.state, self.plan, self.rewriter = state, state.plan, rewriter
        self.activation = activation
        self.stored: dict[tuple[str, str], list[ir.Value]] = {}

    def store(self, group: Group) -> None:
        """Quantize the constants that the plan has points for among a group's inputs."""
        root, row = group.root, group.row
        keys = [(i, use_point(group.name, i)) for i in range(len(root.inputs))]
        weights = [(i, key) for i, key in keys if key in self.plan.points and (i != row.bias or row.bias < 0)]
        for index, key in weights:
            value = root.inputs[index]
            array = const_array(value)
            assert value is not None
            assert array is not None
            point = self.plan.points[key]
            fixed = point.source.kind == "fixed"
            params = (
                fixed_params(point.spec, point.source, array.shape)
                if fixed
                else own_params(array, point.spec, root.op_type)
            )
            bias_key = use_point(group.name, row.bias) if row.bias > 0 else ""
            if bias_key in self.plan.points:
                params = self._with_bias(group, array, params, bias_key)
            self._weight(group, index, value, array, params)

    def _with_bias(self, group: Group, weight: Array, params: QuantParams, key: str) -> QuantParams:
        """Quantize the bias in units of x scale times w scale, raising weight scales where it would overflow."""
        root, row = group.root, group.row
        value = root.inputs[row.bias]
        bias = const_array(value)
        assert value is not None
        assert bias is not None
        x = self.activation(self.plan.points[key].source.points[0])
        axis = params.spec.axis
        rest = tuple(i for i in range(weight.ndim) if i != axis)
        empty = ~np.any(weight, axis=rest) if axis is not None else np.zeros((), np.bool_)
        flat = bias.reshape(-1).astype(np.float32)
        params = fit_bias(params, float(x.scale), flat, empty)
        scale = bias_scale(x, params)
        q = quantize_bias(flat, scale)
        name = str(value.name)
        inputs = [
            self.rewriter.constant(q, f"{name}:q"),
            self.rewriter.constant(scale, f"{name}:scale"),
            self.rewriter.constant(np.zeros(scale.shape, np.int32), f"{name}:zero_point"),
        ]
        self._read(group, row.bias, inputs, {"axis": 0} if scale.ndim else {}, value)
        return params

    def _weight(self, group: Group, index: int, value: ir.Value, array: Array, params: QuantParams) -> None:
        """Store a weight once per set of numbers, and let the group read it."""
        spec, name = params.spec, str(value.name)
        key = (name, repr((spec, params.scale.tobytes(), params.outer)))
        if key not in self.stored:
            if key not in self.state.quantized:
                opset = self.state.model.graph.opset_imports.get("", 21)
                self.state.quantized[key] = _carried(quantize(array, params), params, opset)
            made = [self.rewriter.constant(self.state.quantized[key], f"{name}:q"), *self._scale(name, params)]
            if not (spec.block and spec.symmetric):
                zero = params.zero_point.astype(self.state.quantized[key].dtype)
                made.append(self.rewriter.constant(zero, f"{name}:zero_point"))
            self.stored[key] = made
        inputs = list(self.stored[key])
        if spec.scale_format == "float8e4m3fn":
            inputs[1:3] = [self._scale_of(group, index, inputs[1], inputs[2])]
        attributes = {} if spec.axis is None else {"axis": spec.axis}
        if spec.block:
            attributes["block_size"] = spec.block
        self._read(group, index, inputs, attributes, value)

    def _scale(self, name: str, params: QuantParams) -> list[ir.Value]:
        """Return the constants of a scale: the scale, or block scales in float8e4m3fn and the one above them."""
        steps = np.float32(FLOAT4_STEPS if params.spec.format == FLOAT4 else 1)
        if params.spec.scale_format != "float8e4m3fn":
            return [self.rewriter.constant(params.scale / steps, f"{name}:scale")]
        stored = params.scale.astype(FORMATS[params.spec.scale_format].dtype)
        outer = np.asarray(params.outer, np.float32) / steps
        return [
            self.rewriter.constant(stored, f"{name}:scale"),
            self.rewriter.constant(np.asarray(outer, np.float32), f"{name}:outer_scale"),
        ]

    def _scale_of(self, group: Group, index: int, stored: ir.Value, outer: ir.Value) -> ir.Value:
        """Return block scales as float32, read from their own format."""
        made = self.rewriter.node(
            "DequantizeLinear", [stored, outer], before=group.root, origin=";".join(origins(group.root)) or group.name,
            name=f"{group.name}/DequantizeLinear_{index}_scale", outputs=[f"{stored.name}:dq"],
        ).outputs[0]  # fmt: skip
        self.rewriter.declare(made, ir.DataType.FLOAT, stored.shape)
        return made

    def _read(
        self, group: Group, index: int, inputs: list[ir.Value], attributes: dict[str, int], value: ir.Value
    ) -> None:
        dq = self.rewriter.node(
            "DequantizeLinear",
            inputs,
            before=group.root,
            origin=";".join(origins(group.root)) or group.name,
            name=f"{group.name}/DequantizeLinear_{index}",
            outputs=[f"{value.name}:dq"],
            attributes=attributes,
        ).outputs[0]
        dq.dtype = ir.DataType.FLOAT
        dq.shape = value.shape
        self.rewriter.set_input(group.root, index, dq)
        if not value.uses() and value.is_initializer() and not value.is_graph_output() and value.graph is not None:
            del value.graph.initializers[str(value.name)]


def _carried(stored: Array, params: QuantParams, opset: int) -> Array:
    """Return quantized numbers in the type that carries them in an opset."""
    if params.spec.format == FLOAT4:
        return (stored * FLOAT4_STEPS).astype(np.int8)
    if params.spec.storage.bits == 2 and opset < INT2_OPSET:
        return stored.astype(FORMATS[params.spec.format.replace("2", "4")].dtype)
    return stored.astype(params.spec.storage.dtype)

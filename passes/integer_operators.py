"""ONNX Runtime's integer operators, one emitter each: fused call in, operator out.

An emitter returns the replacement of each of the call's outputs, or None if this form has no such operator.
Input orders are those of the contrib operator documentation (com.microsoft) and of ONNX (QLinearConv, QLinearMatMul).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompiler.ir.graph import attr_int, const_array, is_op
from qcompiler.ir.rewriter import Rewriter
from qcompiler.passes.matmul_nbits import PLAIN_BLOCK, pack, pack_weight, packs, per_block
from qcompiler.patterns.outline import role_indices
from qcompiler.quant.formats import format_of


@dataclass(frozen=True)
class Emission:
    """One call to lower.

    Attributes:
        rewriter: inserts the operator in front of the call.
        call: the fused call.
        function: its body.
        roles: the call's inputs by role.
        weight_bits: bits of the weight's format, 0 for those of the type that carries it.
    """

    rewriter: Rewriter
    call: ir.Node
    function: ir.Function
    roles: Mapping[str, ir.Value]
    weight_bits: int = 0

    def get(self, role: str) -> ir.Value | None:
        """Return the input of a role, or None if this call has none."""
        return self.roles.get(role)

    @property
    def root(self) -> ir.Node:
        """Return the body's computing node."""
        kind = self.function.metadata_props["qcompiler.root"]
        return next(n for n in self.function if n.op_type == kind)

    def dequantize(self, role: str) -> ir.Node:
        """Return the body's DequantizeLinear that reads a role."""
        value = self.function.inputs[role_indices(self.function)[role]]
        return next(n for n in self.function if is_op(n, "DequantizeLinear") and n.inputs[0] is value)

    def outer(self, values: Sequence[ir.Value | None]) -> list[ir.Value | None]:
        """Return what the call passes for the given function inputs; absent ones stay absent."""
        names = list(self.function.inputs)
        return [None if v is None else self.call.inputs[names.index(v)] for v in values]

    @property
    def quantized_output(self) -> bool:
        """Return whether the call ends in a QuantizeLinear."""
        return any(is_op(n, "QuantizeLinear") for n in self.function)

    @property
    def activation(self) -> bool:
        """Return whether a Relu or Clip is left inside, which no integer operator carries."""
        return any(is_op(n, "Relu", "Clip") for n in self.function)

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        domain: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[ir.Value, ...]:
        """Insert the operator under the group's name and return its outputs."""
        group = self.call.name or op_type
        made = self.rewriter.node(
            op_type,
            inputs,
            before=self.call,
            origin=[self.call],
            name=f"{group}:node",
            domain=domain,
            attributes=attributes,
            outputs=len(self.call.outputs),
        )
        self.call.name = self.rewriter.unique(f"{group}:was")
        made.name = group
        for new, old in zip(made.outputs, self.call.outputs, strict=True):
            self.rewriter.take_over(old, new)
        return tuple(made.outputs)

    def root_attributes(self) -> dict[str, Any]:
        """Return the root's attributes as attribute objects by name."""
        return {a.name: a for a in self.root.attributes.values()}


Emitter = Callable[[Emission], tuple[ir.Value, ...] | None]
_MS = "com.microsoft"


def _nine(
    e: Emission, op_type: str, domain: str, attributes: Mapping[str, Any] | None = None, *more: ir.Value | None
) -> tuple[ir.Value, ...] | None:
    """Emit an operator with the usual eight inputs: x, scale, zero point, w, scale, zero point, y scale, zero point."""
    if not e.quantized_output or e.activation:
        return None
    order = ("x", "xs", "xz", "w", "ws", "wz", "ys", "yz")
    return e.emit(op_type, [*(e.get(r) for r in order), *more], domain, attributes)


def qlinear_conv(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QLinearConv (ONNX); its bias is int32."""
    if "b" in e.roles and "bs" not in e.roles:
        return None
    return _nine(e, "QLinearConv", "", e.root_attributes(), *([e.roles["b"]] if "b" in e.roles else []))


def qlinear_matmul(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QLinearMatMul (ONNX); with a float output MatMulIntegerToFloat."""
    if e.quantized_output and "b" in e.roles:
        return None  # a float bias has no place in it
    return _nine(e, "QLinearMatMul", "") if e.quantized_output else matmul_integer_to_float(e)


def qgemm(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QGemm: a, scale, zero point, b, scale, zero point, int32 bias, y scale, y zero point."""
    if not e.quantized_output:
        return matmul_integer_to_float(e)
    if e.activation or ("b" in e.roles and "bs" not in e.roles):
        return None
    order = ("x", "xs", "xz", "w", "ws", "wz", "b", "ys", "yz")
    keep = {k: v for k, v in e.root_attributes().items() if k in ("alpha", "transA", "transB")}
    return e.emit("QGemm", [e.get(r) for r in order], _MS, keep)


def matmul_integer_to_float(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit MatMulIntegerToFloat: a, b, a scale, b scale, a zero point, b zero point, float bias [N]."""
    bias = e.get("b")
    if e.quantized_output or e.activation or "bs" in e.roles or "xs" not in e.roles:
        return None
    if bias is not None:
        array, weight = const_array(bias), e.roles["w"].shape
        if array is None or weight is None or array.size != weight[-1]:
            return None
        if array.ndim != 1:
            bias = e.rewriter.constant(array.reshape(-1), f"{bias.name}:flat")
    order = ("x", "w", "xs", "ws", "xz", "wz")
    inputs = [*(e.get(r) for r in order), *([bias] if bias is not None else [])]
    return e.emit("MatMulIntegerToFloat", inputs, _MS)


def matmul_nbits(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit MatMulNBits: a, packed b, scales, zero points, group index (none), bias [N].

    Accuracy level 4 is what ONNX Runtime chooses itself for the Q/DQ form: on CPU it computes with activations in 8
    bits, quantized at run time.
    """
    weight, scale, zero = const_array(e.get("w")), const_array(e.get("ws")), const_array(e.get("wz"))
    dtype = e.roles["w"].dtype
    storage = format_of(dtype)
    dequantize = e.dequantize("w")
    if weight is None or scale is None or storage is None or "xs" in e.roles or weight.ndim != 2:
        return None
    if scale.dtype != np.float32 or ("wz" in e.roles and zero is None) or e.quantized_output or e.activation:
        return None
    blocked = attr_int(dequantize, "block_size", 0)
    block = blocked or PLAIN_BLOCK
    axis = attr_int(dequantize, "axis", 1) % 2
    if not packs(e.weight_bits or storage.bits, block) or (scale.size > 1 and axis != (0 if blocked else 1)):
        return None
    length, columns = weight.shape
    shape = (-(-length // block), columns)
    bits = e.weight_bits or storage.bits
    shift = 1 << (bits - 1) if storage.signed else 0
    middle = np.zeros((), np.int64) if zero is None else zero.astype(np.int64)
    zeros = np.ascontiguousarray(per_block(middle + shift, shape, bool(blocked) and zero is not None))
    packed = pack_weight(weight.astype(np.int64) + shift, zeros, block, bits)
    scales = np.ascontiguousarray(per_block(scale, shape, bool(blocked)).T)
    name = str(e.roles["w"].name)
    inputs = [e.get("x"), e.rewriter.constant(packed, f"{name}:nbits"), e.rewriter.constant(scales, f"{name}:scales")]
    bias = _flat_bias(e, columns)
    if "b" in e.roles and bias is None:
        return None
    # Without zero points the operator takes the middle of its range, which is that of a signed format's 0.
    plain = bool((zeros == 1 << (bits - 1)).all())
    if not plain:
        inputs.append(e.rewriter.constant(pack(zeros.T, bits), f"{name}:zero_points"))
    if bias is not None:
        inputs += [*([None] if plain else []), None, bias]
    attributes = {"K": length, "N": columns, "bits": bits, "block_size": block, "accuracy_level": 4}
    return e.emit("MatMulNBits", inputs, _MS, attributes)


def _flat_bias(e: Emission, columns: int) -> ir.Value | None:
    """Return the bias as a constant [N], or None if there is none or it is another."""
    bias = e.get("b")
    array = const_array(bias)
    if bias is None or array is None or array.size != columns:
        return None
    return bias if array.ndim == 1 else e.rewriter.constant(array.reshape(-1), f"{bias.name}:flat")


def qlinear_binary(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QLinearAdd or QLinearMul: a, scale, zero point, b, scale, zero point, y scale, y zero point."""
    return _nine(e, f"QLinear{e.root.op_type}", _MS)


def qlinear_concat(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QLinearConcat: y scale, y zero point, then (x, scale, zero point) per input."""
    parts: list[ir.Value | None] = []
    for index in range(len(e.root.inputs)):
        parts += [e.get(f"part.{index}.{role}") for role in ("x", "xs", "xz")]
    return e.emit("QLinearConcat", [e.get("ys"), e.get("yz"), *parts], _MS, e.root_attributes())


def qlinear_unary(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit QLinearSigmoid, QLinearLeakyRelu, QLinearAveragePool, QLinearGlobalAveragePool."""
    attributes = dict(e.root_attributes())
    dilations = attributes.pop("dilations", None)
    if not e.quantized_output or (dilations is not None and any(d != 1 for d in dilations.as_ints())):
        return None
    return e.emit(f"QLinear{e.root.op_type}", [e.get(r) for r in ("x", "xs", "xz", "ys", "yz")], _MS, attributes)


def move_integers(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit the operator itself on integers; parameters in and out must be the same values."""
    if e.get("xs") is not e.get("ys") or e.get("xz") is not e.get("yz"):
        return None
    return e.emit(e.root.op_type, [e.get("x"), *e.outer(e.root.inputs[1:])], "", e.root_attributes())


def dynamic_quantize_lstm(e: Emission) -> tuple[ir.Value, ...] | None:
    """Emit DynamicQuantizeLSTM; it takes W and R transposed, [directions, inputs, 4 x hidden]."""
    w, r = const_array(e.roles["w"]), const_array(e.roles["r"])
    if w is None or r is None:
        return None
    scales = []
    for role in ("w", "r"):
        scale, zero = const_array(e.roles[role + "s"]), const_array(e.roles[role + "z"])
        assert scale is not None
        assert zero is not None
        count = w.shape[0]
        name = str(e.roles[role].name)
        scales.append(e.rewriter.constant(np.broadcast_to(scale.reshape(-1), (count,)).copy(), f"{name}:lstm_scale"))
        scales.append(e.rewriter.constant(np.broadcast_to(zero.reshape(-1), (count,)).copy(), f"{name}:lstm_zp"))
    weights = [
        e.rewriter.constant(np.ascontiguousarray(a.transpose(0, 2, 1)), f"{e.roles[k].name}:t")
        for k, a in (("w", w), ("r", r))
    ]
    # Inputs: X, W, R, B, sequence_lens, initial_h, initial_c, P, then scales and zero points of W and R.
    rest = e.outer(e.root.inputs[3:8])
    rest += [None] * (5 - len(rest))
    keep = {k: v for k, v in e.root_attributes().items() if k != "layout"}
    return e.emit("DynamicQuantizeLSTM", [e.get("x"), *weights, *rest, *scales], _MS, keep)


_MOVERS = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Expand", "Tile", "DepthToSpace",
    "MaxPool", "Resize",
)  # fmt: skip

EMITTERS: Mapping[str, Emitter] = {
    "Conv": qlinear_conv,
    "MatMul": qlinear_matmul,
    "Gemm": qgemm,
    "Add": qlinear_binary,
    "Mul": qlinear_binary,
    "Concat": qlinear_concat,
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "MatMulNBits": matmul_nbits,
    "DynamicQuantizeLSTM": dynamic_quantize_lstm,
    "LSTM": dynamic_quantize_lstm,
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"), qlinear_unary),
    **dict.fromkeys(_MOVERS, move_integers),
}
